# SPDX-License-Identifier: Apache-2.0
"""The network, as far as ranks need it to find each other: names, addresses, and ports that answer."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from threading import Thread
from time import perf_counter
from typing import Any

from ..errors import ConfigError

DEFAULT_PORT = 29400
"""That of torchrun's c10d rendezvous; see its ``--rdzv-endpoint``."""
PATIENCE = 5.0
"""Seconds that a host has to answer."""
NAME_PATIENCE = 10.0
"""Seconds that name servers have."""
STATIC_PORT = 29500
"""That of torchrun without a rendezvous; see its ``--master-port``."""
_ECHO_SECONDS = 0.5
_BROADCAST = ipaddress.IPv4Address("255.255.255.255")
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
    scope: int = 0
    """Number of the network interface, for addresses that count only on one; else 0."""

    @property
    def place(self) -> tuple[Any, ...]:
        """As sockets want it."""
        return (self.host, self.port, 0, self.scope) if self.family == socket.AF_INET6 else (self.host, self.port)

    @property
    def is_loopback(self) -> bool:
        """Whether only this host reaches itself by it."""
        return ipaddress.ip_address(self.host).is_loopback

    @property
    def is_of_one_host(self) -> bool:
        """Whether it is one that a host can have, and no sign for any or for many."""
        address = ipaddress.ip_address(self.host)
        return not (address.is_unspecified or address.is_multicast or address == _BROADCAST)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Network:
    """What the operating system does. Methods raise `OSError` as it reports it.

    Names are asked for once, with ``lookup``, which has ``patience`` seconds.
    """

    def __init__(self, lookup: Callable[..., Any] = socket.getaddrinfo, patience: float = NAME_PATIENCE) -> None:
        self._lookup = lookup
        self._patience = patience
        self._known: dict[str, list[Address] | OSError] = {}

    def name(self) -> str:
        """The name of this host."""
        return socket.gethostname()

    def resolve(self, host: str, port: int) -> list[Address]:
        """The addresses of a host, without repetition; raises `OSError`, also for what cannot be a name."""
        if host not in self._known:
            self._known[host] = self._ask_in_time(host)
        found = self._known[host]
        if isinstance(found, OSError):
            raise found
        return [replace(address, port=port) for address in found]

    def _ask_in_time(self, host: str) -> list[Address] | OSError:
        answers: SimpleQueue[list[Address] | OSError] = SimpleQueue()
        # a daemon: the system cannot be told to stop asking, and nobody has to wait for it
        Thread(target=lambda: answers.put(self._ask(host)), daemon=True).start()
        try:
            return answers.get(timeout=self._patience)
        except Empty:
            return TimeoutError(errno.ETIMEDOUT, f"no answer within {self._patience:g} s")

    def _ask(self, host: str) -> list[Address] | OSError:
        try:
            found = self._lookup(host, None, type=socket.SOCK_STREAM)
        except OSError as error:
            return error
        except ValueError as error:
            return OSError(f"it is no name of a host: {error}")
        known = (socket.AF_INET, socket.AF_INET6)
        places = [(family, place) for family, _, _, _, place in found if family in known]
        return list(dict.fromkeys(Address(family, str(place[0]), 0, *place[3:]) for family, place in places))

    def is_here(self, address: Address) -> bool:
        """Whether an address is one of this host's: what it sends to itself arrives.

        That it can be bound to does not tell: see ip_nonlocal_bind in ip(7).
        """
        try:
            with socket.socket(address.family, socket.SOCK_DGRAM) as own:
                own.bind(replace(address, port=0).place)
                own.connect(own.getsockname())
                own.settimeout(_ECHO_SECONDS)
                own.send(b".")
                return own.recv(1) == b"."
        except OSError:
            return False

    def listen(self, address: Address) -> None:
        """Listen for a moment."""
        with socket.socket(address.family, socket.SOCK_STREAM) as server:
            # as torch's store does: what is left of earlier connections is no hindrance
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address.place)
            server.listen(1)

    def connect(self, address: Address, timeout: float) -> float:
        """Connect, and leave again; the seconds that it took. Raises `TimeoutError` after ``timeout`` seconds."""
        begun = perf_counter()
        with socket.socket(address.family, socket.SOCK_STREAM) as client:
            client.settimeout(timeout)
            client.connect(address.place)
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
    return f"{host}:{port or STATIC_PORT}" if host else None
