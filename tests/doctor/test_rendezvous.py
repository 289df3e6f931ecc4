# SPDX-License-Identifier: Apache-2.0
"""Whether the nodes of a job can find each other: real ports of this host, and hosts that are not there."""

from __future__ import annotations

import errno
import ipaddress
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from shardckpt.doctor import Finding, Machine, Network, parse_endpoint
from shardckpt.doctor.network import PATIENCE, Address, endpoint_in
from shardckpt.doctor.rendezvous import check_host_name, check_rendezvous
from shardckpt.errors import ConfigError


def endpoint(text: str | None, network: Network | None = None) -> Finding:
    [found] = check_rendezvous(Machine(endpoint=text, network=network or Network()))
    return found


def names(text: str | None, network: Network) -> list[Finding]:
    return list(check_host_name(Machine(endpoint=text, network=network)))


class Elsewhere(Network):
    """Hosts by name, and what comes of connecting to their addresses; this host is called ``me``."""

    def __init__(self, hosts: Mapping[str, list[str]], answers: Mapping[str, float | OSError] | None = None) -> None:
        self._hosts = hosts
        self._answers = answers or {}
        self.timeouts: list[float] = []

    def name(self) -> str:
        return "me"

    def resolve(self, host: str, port: int) -> list[Address]:
        if host not in self._hosts:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [Address(socket.AF_INET6 if ":" in found else socket.AF_INET, found, port) for found in self._hosts[host]]

    def is_here(self, address: Address) -> bool:
        return address.host not in self._answers

    def connect(self, address: Address, timeout: float) -> float:
        self.timeouts.append(timeout)
        answer = self._answers[address.host]
        if isinstance(answer, OSError):
            raise answer
        return answer


# ---- endpoints


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("node0:29500", "node0", 29500),
        ("node0", "node0", 29400),
        (" 10.0.0.1:1 ", "10.0.0.1", 1),
        ("[fe80::1]:65535", "fe80::1", 65535),
        ("[::1]", "::1", 29400),
        ("gpu-7.cluster.local:80", "gpu-7.cluster.local", 80),
    ],
)
def test_endpoints(text: str, host: str, port: int) -> None:
    assert parse_endpoint(text) == (host, port)


@pytest.mark.parametrize(
    "text",
    ["", ":29500", "node0:", "node0:0", "node0:65536", "node0:1e3", "a b:1", "::1:29500", "[]:1", "n\0:1", "n\x1b:1", "n:१"],
)
def test_what_is_no_endpoint(text: str) -> None:
    with pytest.raises(ConfigError, match="is no rendezvous endpoint; write HOST:PORT"):
        parse_endpoint(text)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"MASTER_PORT": "29500"}, None),
        ({"MASTER_ADDR": "node0"}, "node0:29500"),
        ({"MASTER_ADDR": "fe80::1"}, "[fe80::1]:29500"),
        ({"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}, "node0:29500"),
        ({"MASTER_ADDR": "fe80::1", "MASTER_PORT": "29500"}, "[fe80::1]:29500"),
        ({"MASTER_ADDR": "node0", "PET_RDZV_ENDPOINT": "node1:1"}, "node1:1"),
        ({"MASTER_ADDR": "node0", "PET_RDZV_ENDPOINT": " "}, "node0:29500"),
    ],
)
def test_endpoints_of_the_environment(environ: dict[str, str], expected: str | None) -> None:
    assert endpoint_in(environ) == expected


def test_what_launchers_say_counts_unless_something_else_was_given() -> None:
    environ = {"SHARDCKPT_ROOT": "/a", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "16", "MASTER_ADDR": "node0"}
    told = Machine.with_environment(environ, root=None, ranks_per_node=2)
    assert (told.root, told.ranks_per_node, told.world_size, told.endpoint) == ("/a", 2, 16, "node0:29500")
    empty = Machine.with_environment({"SHARDCKPT_ROOT": "", "WORLD_SIZE": "many", "LOCAL_WORLD_SIZE": "0"})
    assert (empty.root, empty.ranks_per_node, empty.world_size, empty.endpoint) == (None, None, None, None)


def test_an_environment_that_names_no_endpoint_is_a_problem() -> None:
    found = endpoint("node0:http")
    assert (found.status, found.remedy) == ("problem", "write HOST:PORT with a port from 1 to 65535, or [ADDRESS]:PORT")


# ---- ports of this host


@pytest.fixture
def port() -> Iterator[int]:
    """One that nothing listens on, and that nobody else is given."""
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", 0))
        yield int(free.getsockname()[1])


def test_a_free_port_of_this_host(port: int) -> None:
    found = endpoint(f"127.0.0.1:{port}")
    assert (found.status, found.remedy) == ("ok", "")
    assert (
        found.text == f"127.0.0.1 is this host (127.0.0.1:{port}), by an address that other hosts cannot use; the port is free"
    )
    assert found.values["here"] is True


def test_a_port_of_this_host_on_which_something_listens() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        found = endpoint(f"127.0.0.1:{server.getsockname()[1]}")
    assert found.status == "warning"
    assert found.text.endswith("something listens on the port")
    assert "another port" in found.remedy


def test_connections_are_really_made(port: int) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        heard = Address(socket.AF_INET, "127.0.0.1", server.getsockname()[1])
        assert Network().connect(heard, 60.0) > 0
    with pytest.raises(ConnectionRefusedError):
        Network().connect(Address(socket.AF_INET, "127.0.0.1", port), 60.0)
    assert Network().is_here(Address(socket.AF_INET, "127.0.0.1", 1))
    # of the block that is kept for documentation: nobody has it
    assert not Network().is_here(Address(socket.AF_INET, "192.0.2.1", 1))


SPACE = """
import socket, sys
from shardckpt.doctor.network import Address, Network
network = Network()
[scoped] = network.resolve("fe80::77%d0", 1)
print(scoped, scoped.scope > 0, network.is_here(scoped), scoped in network.resolve("fe80::77%d0", 1))
network.listen(scoped)
for host in ("10.9.0.8", "10.9.0.9", "10.9.0.77", "127.0.1.1"):
    print(host, network.is_here(Address(socket.AF_INET, host, 1)))
"""


@pytest.mark.slow
def test_addresses_of_a_host_that_may_bind_to_any() -> None:
    """A second address of an interface is this host's, too, though connections do not come from it."""
    setup = (
        "ip link set lo up && ip link add d0 type veth peer name d1 && ip link set d1 up && ip addr add 10.9.0.8/24 dev d0 && "
        "ip addr add 10.9.0.9/24 dev d0 && ip addr add fe80::77/64 dev d0 nodad && ip link set d0 up && "
        "echo 1 > /proc/sys/net/ipv4/ip_nonlocal_bind"
    )
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("networks cannot be made here: unshare or ip is not installed")
    command = ["unshare", "--net", "sh", "-c", f'{setup} || exit 77; exec "$0" -c "$1"', sys.executable, SPACE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"networks cannot be made here: {done.stderr.strip()}")
    assert done.stdout.splitlines() == [
        "[fe80::77]:1 True True True",
        "10.9.0.8 True",
        "10.9.0.9 True",
        "10.9.0.77 False",
        "127.0.1.1 True",
    ], done.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "255.255.255.255", "224.0.0.1", "[ff02::1]"])
def test_addresses_of_no_host_are_no_endpoint(host: str) -> None:
    found = endpoint(f"{host}:29500")
    assert found.status == "problem"
    assert "is no address of one host" in found.text
    assert found.remedy.startswith("name the host")


def found_at(*hosts: str) -> list[Any]:
    """What the system answers for a name of these addresses."""
    return [
        (socket.AF_INET6, 1, 6, "", (host, 0, 0, 0)) if ":" in host else (socket.AF_INET, 1, 6, "", (host, 0)) for host in hosts
    ]


def test_a_name_is_asked_for_once() -> None:
    asked = []

    def look_up(host: str, port: object, **given: object) -> list[Any]:
        asked.append(host)
        return found_at("10.0.0.1", "10.0.0.1", "fe80::1")

    network = Network(look_up)
    assert [str(address) for address in network.resolve("node0", 5)] == ["10.0.0.1:5", "[fe80::1]:5"]
    assert [address.port for address in network.resolve("node0", 6)] == [6, 6]
    assert asked == ["node0"]


def test_name_servers_that_do_not_answer_are_given_up() -> None:
    forever = threading.Event()

    def look_up(host: str, port: object, **given: object) -> list[Any]:
        forever.wait()
        return []

    network = Network(look_up, patience=0.05)
    found = endpoint("node0:29500", network)
    assert (found.status, found.text) == ("problem", "node0 has no address: no answer within 0.05 s")
    assert "/etc/resolv.conf" in found.remedy
    assert names("node0:29500", network) == []
    forever.set()


def test_name_servers_that_cannot_be_reached_are_no_matter_of_entries() -> None:
    def look_up(host: str, port: object, **given: object) -> list[Any]:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    assert "/etc/resolv.conf" in endpoint("node0:29500", Network(look_up)).remedy


@pytest.mark.parametrize("host", ["a" * 64, "..", "ü" * 70])
def test_names_without_an_address(host: str) -> None:
    found = endpoint(f"{host}:29500")
    assert found.status == "problem"
    assert found.text.startswith(f"{host} has no address: ")
    assert "/etc/hosts" in found.remedy


# ---- other hosts


def test_a_host_that_no_name_server_knows() -> None:
    found = endpoint("node9:29500", Elsewhere({}))
    assert (found.status, found.text) == ("problem", "node9 has no address: Name or service not known")


@pytest.mark.parametrize(
    ("answer", "status", "said", "remedy"),
    [
        (0.0125, "ok", "node0 (10.0.0.7:29500) answers after 12.5 ms", ""),
        (ConnectionRefusedError(), "warning", "nothing listens on the port", "the agent on that host listens"),
        (TimeoutError(), "problem", "does not answer within 5 s", "firewalls"),
        (OSError(errno.EHOSTUNREACH, "No route to host"), "problem", "cannot be reached: No route to host", "routes"),
    ],
)
def test_other_hosts(answer: float | OSError, status: str, said: str, remedy: str) -> None:
    network = Elsewhere({"node0": ["10.0.0.7"]}, {"10.0.0.7": answer})
    found = endpoint("node0:29500", network)
    assert found.status == status
    assert said in found.text
    assert remedy in found.remedy
    assert network.timeouts == [PATIENCE]


def test_one_address_that_answers_is_enough() -> None:
    network = Elsewhere({"node0": ["fe80::7", "10.0.0.7"]}, {"fe80::7": OSError(errno.ENETUNREACH, "x"), "10.0.0.7": 0.001})
    assert endpoint("node0:29500", network).values["address"] == "10.0.0.7"


def test_addresses_that_do_not_answer_are_waited_for_together() -> None:
    class Silent(Elsewhere):
        def connect(self, address: Address, timeout: float) -> float:
            meeting.wait(10)
            raise TimeoutError

    addresses = [str(ipaddress.ip_address("10.0.0.1") + number) for number in range(6)]
    # all six have to be there at once for one to go on
    meeting = threading.Barrier(6)
    network = Silent({"node0": addresses}, dict.fromkeys(addresses, 1.0))
    begun = time.monotonic()
    assert "does not answer" in endpoint("node0:29500", network).text
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("text", "mine", "status"),
    [
        ("me:29500", ["127.0.1.1"], "warning"),
        ("me:29500", ["127.0.1.1", "10.0.0.1"], "ok"),
        ("localhost:29500", ["127.0.0.1"], "ok"),
        ("127.0.1.1:29500", ["127.0.1.1"], "ok"),
    ],
)
def test_a_name_that_is_loopback_is_of_no_use_to_others(text: str, mine: list[str], status: str) -> None:
    class Quiet(Elsewhere):
        def listen(self, address: Address) -> None:
            pass

    network = Quiet({"me": mine, text.partition(":")[0]: mine})
    found = endpoint(text, network)
    assert found.status == status
    assert ("/etc/hosts" in found.remedy) is (status == "warning")
    # the own name is another matter, unless no other host is meant
    assert [finding.status for finding in names(text, network)] == ([] if not text.startswith("me") else [status])


def test_a_port_that_may_not_be_listened_on() -> None:
    class Privileged(Elsewhere):
        def listen(self, address: Address) -> None:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    found = endpoint("me:80", Privileged({"me": ["10.0.0.1"]}))
    assert found.status == "problem"
    assert found.text == "me is this host (10.0.0.1:80), and cannot listen there: Permission denied"


def test_a_name_with_no_address_of_a_kind_that_is_known() -> None:
    assert endpoint("odd:1", Elsewhere({"odd": []})).text == "odd has no address of IPv4 or IPv6"


# ---- the name of this host


@pytest.mark.parametrize(
    ("mine", "status", "said"),
    [
        (["10.0.0.8", "fe80::8"], "ok", "me is 10.0.0.8, fe80::8"),
        (["127.0.1.1"], "warning", "me is 127.0.1.1 here"),
        (None, "warning", "me has no address, and other nodes look for ranks by it: Name or service not known"),
    ],
)
def test_the_name_that_other_nodes_are_told(mine: list[str] | None, status: str, said: str) -> None:
    hosts = {"node0": ["10.0.0.7"], **({} if mine is None else {"me": mine})}
    [found] = names("node0:29500", Elsewhere(hosts))
    assert found.status == status
    assert said in found.text
    assert bool(found.remedy) is (status != "ok")


@pytest.mark.parametrize("text", [None, "localhost:29500", "nowhere:1", "no endpoint"])
def test_a_job_of_one_node_needs_no_name(text: str | None) -> None:
    assert names(text, Elsewhere({"localhost": ["::1", "127.0.0.1"]})) == []
