# SPDX-License-Identifier: Apache-2.0
"""Checks of what the nodes of a job need to find each other: the rendezvous endpoint, and the name of this host."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from ..errors import ConfigError
from .finding import Finding, milliseconds, refusal
from .machine import Machine
from .network import PATIENCE, Address, Network, parse_endpoint

_OPEN_IT = "look at firewalls and security groups between the nodes, and at the routes (ip route get ADDRESS)"
_IN_DNS = "enter it in DNS, or in /etc/hosts of every node"
_MEND_DNS = "no name server answers: look at the servers in /etc/resolv.conf and the network to them"


def check_rendezvous(machine: Machine) -> Iterator[Finding]:
    """Whether the endpoint has an address, and answers from here or can be listened on."""
    if machine.endpoint is None:
        yield Finding(
            "rendezvous", "ok", "not checked: to try that of a job of several nodes, give it: --rdzv-endpoint HOST:PORT"
        )
        return
    try:
        host, port = parse_endpoint(machine.endpoint)
    except ConfigError as error:
        yield refusal("rendezvous", error)
        return
    try:
        addresses = machine.network.resolve(host, port)
    except OSError as error:
        values = {"host": host, "port": port}
        yield Finding("rendezvous", "problem", f"{host} has no address: {reason(error)}", _remedy(error), values)
        return
    yield _judge_addresses(machine.network, host, port, addresses)


def _judge_addresses(network: Network, host: str, port: int, addresses: list[Address]) -> Finding:
    """The best that can be said of any of the addresses: whoever connects tries them all."""
    if not addresses:
        values = {"host": host, "port": port}
        return Finding("rendezvous", "problem", f"{host} has no address of IPv4 or IPv6", _IN_DNS, values)
    # at once: those that do not answer take their time
    with ThreadPoolExecutor(len(addresses)) as pool:
        found = list(pool.map(lambda address: _judge_address(network, host, address), addresses))
    return min(found, key=lambda finding: ("ok", "warning", "problem").index(finding.status))


def _judge_address(network: Network, host: str, address: Address) -> Finding:
    if not address.is_of_one_host:
        remedy = "name the host that the first agent runs on, by a name or address that the other nodes know"
        text = f"{host} ({address}) is no address of one host, and nobody can connect to it"
        return Finding("rendezvous", "problem", text, remedy, {"host": host, "port": address.port, "address": address.host})
    values = {"host": host, "port": address.port, "address": address.host, "here": network.is_here(address)}
    if values["here"]:
        return _judge_own(network, host, address, values)
    text = f"{host} ({address})"
    try:
        seconds = network.connect(address, PATIENCE)
    except ConnectionRefusedError:
        remedy = "fine while no job runs: the agent on that host listens. Else look at the port, and whether that agent runs"
        return Finding("rendezvous", "warning", f"{text} can be reached, and nothing listens on the port", remedy, values)
    except TimeoutError:
        return Finding("rendezvous", "problem", f"{text} does not answer within {PATIENCE:g} s", _OPEN_IT, values)
    except OSError as error:
        return Finding("rendezvous", "problem", f"{text} cannot be reached: {reason(error)}", _OPEN_IT, values)
    values["seconds"] = seconds
    return Finding("rendezvous", "ok", f"{text} answers after {milliseconds(seconds)}", values=values)


def _judge_own(network: Network, host: str, address: Address, values: dict[str, object]) -> Finding:
    text = f"{host} is this host ({address})"
    if address.is_loopback:
        text += ", by an address that other hosts cannot use"
    remedies = []
    if address.is_loopback and not _is_local(host):
        remedies.append(f"give {host} the address that other nodes use in /etc/hosts, or name that address as the endpoint")
    try:
        network.listen(address)
        text += "; the port is free"
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            remedy = "choose a port from 1024 on that nothing else uses"
            return Finding("rendezvous", "problem", f"{text}, and cannot listen there: {reason(error)}", remedy, values)
        text += "; something listens on the port"
        remedies.append("fine if it is the job's own agent; else choose another port (ss -ltnp shows who has it)")
    return Finding("rendezvous", "warning" if remedies else "ok", text, "; ".join(remedies), values)


def _is_local(host: str) -> bool:
    """Whether whoever wrote this means the own host alone, if it is the own host: names are for others, too."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host.lower() == "localhost"
    return True


def check_host_name(machine: Machine) -> Iterator[Finding]:
    """Whether other nodes can be told this host's name, which is how rank 0 is found if it runs here."""
    if machine.endpoint is not None and _is_for_others(machine.network, machine.endpoint):
        yield _judge_name(machine.network, machine.network.name())


def _is_for_others(network: Network, endpoint: str) -> bool:
    """Whether other hosts can be meant; not if there is something wrong with the endpoint, which has been told."""
    try:
        host, port = parse_endpoint(endpoint)
        addresses = network.resolve(host, port)
    except (OSError, ConfigError):
        return False
    return not (_is_local(host) and all(address.is_loopback for address in addresses))


def _judge_name(network: Network, name: str) -> Finding:
    values = {"name": name}
    try:
        addresses = network.resolve(name, 0)
    except OSError as error:
        text = f"{name} has no address, and other nodes look for ranks by it: {reason(error)}"
        remedy = f"{_remedy(error)}, or give each agent an address: --local-addr of torchrun"
        return Finding("host name", "warning", text, remedy, values)
    shown = ", ".join(address.host for address in addresses)
    if all(address.is_loopback for address in addresses):
        remedy = "give it the address that other nodes use in /etc/hosts, or name the interface in GLOO_SOCKET_IFNAME"
        return Finding("host name", "warning", f"{name} is {shown} here, which gloo would tell other nodes", remedy, values)
    return Finding("host name", "ok", f"{name} is {shown}", values=values)


def _remedy(error: OSError) -> str:
    """What to do about a name without an address."""
    return _MEND_DNS if isinstance(error, TimeoutError) or error.errno == socket.EAI_AGAIN else _IN_DNS


def reason(error: OSError) -> str:
    """What the system says, without numbers."""
    return error.strerror or (os.strerror(error.errno) if error.errno else str(error))
