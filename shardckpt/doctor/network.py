# SPDX-License-Identifier: Apache-2.0
"""The network, as far as ranks need it to find each other: names, addresses, and ports that answer."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter

from ..errors import ConfigError

DEFAULT_PORT = 29400
"""That of torchrun's c10d rendezvous; see its ``--rdzv-endpoint``."""
PATIENCE = 5.0
"""Seconds that a host has to answer."""
_ENDPOINT = re.compile(r"(?:\[(?P<six>[^\[\]\s]+)\]|(?P<host>[^\[\]\s:]+))(?::(?P<port>[0-9]{1,5}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Address:
    """One address of a host."""

    family: socket.AddressFamily
    """IPv4 or IPv6."""
    host: str
    """In digits."""
    port: int
    """0 for any."""

    @property
    def is_loopback(self) -> bool:
        """Whether only this host reaches itself by it."""
        return ipaddress.ip_address(self.host.partition("%")[0]).is_loopback

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Network:
    """What the operating system does. Methods raise `OSError` as it reports it."""

    def name(self) -> str:
        """The name of this host."""
        return socket.gethostname()

    def resolve(self, host: str, port: int) -> list[Address]:
        """The addresses of a host, without repetition; raises `OSError`, also for what cannot be a name."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except UnicodeError as error:
            raise OSError(f"it is no name of a host: {error}") from error
        known = (socket.AF_INET, socket.AF_INET6)
        addresses = [Address(family, str(place[0]), port) for family, _, _, _, place in found if family in known]
        return list(dict.fromkeys(addresses))

    def is_here(self, address: Address) -> bool:
        """Whether an address is one of this host's."""
        try:
            with socket.socket(address.family, socket.SOCK_STREAM) as any_port:
                any_port.bind((address.host, 0))
        except OSError:
            return False
        return True

    def listen(self, address: Address) -> None:
        """Listen for a moment."""
        with socket.socket(address.family, socket.SOCK_STREAM) as server:
            # as torch's store does: what is left of earlier connections is no hindrance
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind((address.host, address.port))
            server.listen(1)

    def connect(self, address: Address, timeout: float) -> float:
        """Connect, and leave again; the seconds that it took. Raises `TimeoutError` after ``timeout`` seconds."""
        begun = perf_counter()
        with socket.socket(address.family, socket.SOCK_STREAM) as client:
            client.settimeout(timeout)
            client.connect((address.host, address.port))
        return perf_counter() - begun


def parse_endpoint(text: str) -> tuple[str, int]:
    """Host and port of ``HOST``, ``HOST:PORT`` or ``[ADDRESS]:PORT``; raises `ConfigError`."""
    found = _ENDPOINT.fullmatch(text.strip())
    port = DEFAULT_PORT if found is None or found["port"] is None else int(found["port"])
    if found is None or not text.isprintable() or not 0 < port < 1 << 16:
        raise ConfigError(f"{text!r} is no rendezvous endpoint; write HOST:PORT with a port from 1 to 65535, or [ADDRESS]:PORT")
    return found["six"] or found["host"], port


def endpoint_in(environ: Mapping[str, str]) -> str | None:
    """The endpoint that the environment names, by a variable of torchrun or those that it gives to its workers."""
    endpoint = environ.get("PET_RDZV_ENDPOINT", "").strip()
    if endpoint:
        return endpoint
    host, port = environ.get("MASTER_ADDR", "").strip(), environ.get("MASTER_PORT", "").strip()
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    return (f"{host}:{port}" if port else host) or None if host else None
