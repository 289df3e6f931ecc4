# SPDX-License-Identifier: Apache-2.0
"""Hosts as namespaces: each has an address, a name, processes and mounts of its own, and a cable to a common switch.

A host lives as long as its first process, a ``cat`` that waits for pytest to close a pipe; with it the kernel takes away all
processes, links and mounts of the host. So nothing is left behind, however a test or pytest itself ends. Needs root, and
``ip``, ``unshare`` and ``nsenter``, which belong to Debian's base system and to iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from tests.style.source import ROOT

SWITCH = "10.77.0.254"
"""Address of the switch, where what belongs to no host can listen."""
_KINDS = ("--net", "--uts", "--mount", "--pid", "--mount-proc")
_RELAY = Path(__file__).with_name("relay.py")


class CannotBuild(Exception):
    """This machine has not what it takes, or does not allow it."""


def why_not() -> str | None:
    """Why there can be no hosts here; None when there can."""
    missing = [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not installed (Debian: iproute2, util-linux)"
    probe = "ip link add probe0 type veth peer name probe1 && ip link add probe2 type bridge"
    done = subprocess.run(["unshare", *_KINDS, "--fork", "sh", "-c", probe], capture_output=True, text=True, timeout=60)
    return None if done.returncode == 0 else f"no right to make hosts of namespaces: {done.stderr.strip()}"


class Space:
    """Namespaces with a process that keeps them alive."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._keeper = subprocess.Popen(
            ["unshare", *_KINDS, "--fork", "--kill-child", "cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # it complains when its child is killed
            stderr=subprocess.DEVNULL,
        )
        assert self._keeper.stdin is not None and self._keeper.stdout is not None
        self._keeper.stdin.write(b".")
        self._keeper.stdin.flush()
        # cat answers when everything that unshare does is done
        if self._keeper.stdout.read(1) != b".":
            raise CannotBuild(f"{name} did not come up")
        keeper = self._keeper.pid
        self.pid = int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text())
        """Of its first process, as seen from outside."""
        self.run("hostname", name)
        self.run("ip", "link", "set", "lo", "up")
        self.run("mount", "-t", "tmpfs", "tmpfs", "/dev/shm")

    def inside(self, *command: str) -> list[str]:
        """A command that runs another one in here."""
        return ["nsenter", "-t", str(self.pid), "--net", "--uts", "--mount", "--pid", f"--wd={ROOT}", *command]

    def run(self, *command: str) -> None:
        """Run a command in here, to its end."""
        done = subprocess.run(self.inside(*command), capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            raise CannotBuild(f"{self.name}: {' '.join(command)}: {done.stderr or done.stdout}")

    def start(self, *command: str, log: IO[bytes], environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a command in here; it dies with the host."""
        env = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
        return subprocess.Popen(self.inside(*command), env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def kill(self) -> None:
        """Kill all processes in here at once, as when the power goes; returns when they are dead."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._keeper.wait(60)
        for pipe in (self._keeper.stdin, self._keeper.stdout):
            if pipe is not None:
                pipe.close()


class Network:
    """A switch, and hosts ``node0``, ``node1``, ... with the addresses 10.77.0.1, 10.77.0.2, ..."""

    def __init__(self, size: int, directory: Path) -> None:
        """``directory`` is for small files of its own."""
        addresses = {SWITCH: "switch"} | {self._address(number): f"node{number}" for number in range(size)}
        # servers on IPv6 sockets look up the names of their clients by these
        mapped = {f"::ffff:{address}": name for address, name in addresses.items()}
        names = {"127.0.0.1": "localhost"} | addresses | mapped
        self._files = {"hosts": "".join(f"{address} {name}\n" for address, name in names.items())}
        # nobody listens there, so what is not in hosts is not found at once
        self._files["resolv.conf"] = "nameserver 127.0.0.1\n"
        self._directory = directory
        for file, text in self._files.items():
            (directory / file).write_text(text)
        self.switch = self._start("switch")
        self.hosts: dict[int, Space] = {}
        # an address of its own: else it has that of one of its ports, and another one when ports come and go
        self.switch.run("ip", "link", "add", "br0", "address", "02:00:00:00:00:fe", "type", "bridge")
        self.switch.run("ip", "address", "add", f"{SWITCH}/24", "dev", "br0")
        self.switch.run("ip", "link", "set", "br0", "up")
        for number in range(size):
            self.boot(number)

    def _start(self, name: str) -> Space:
        space = Space(name)
        for file in self._files:
            space.run("mount", "--bind", str(self._directory / file), f"/etc/{file}")
        return space

    @staticmethod
    def _address(number: int) -> str:
        return f"10.77.0.{number + 1}"

    def boot(self, number: int) -> Space:
        """Start a host that is not there (any more)."""
        host = self.hosts[number] = self._start(f"node{number}")
        # made from outside, where both process numbers mean something
        # the others remember the address of a card, which is the same after a reboot
        card = f"02:00:00:00:00:{number + 1:02x}"
        cable = ["type", "veth", "peer", "name", "eth0", "address", card, "netns", str(host.pid)]
        enter = ["nsenter", "-t", str(self.switch.pid), "--net", "ip", "link", "add", f"port{number}"]
        subprocess.run([*enter, *cable], check=True, timeout=60)
        host.run("ip", "address", "add", f"{self._address(number)}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        self.switch.run("ip", "link", "set", f"port{number}", "master", "br0", "up")
        return host

    def kill(self, number: int) -> None:
        """Kill a host, cable and all."""
        self.hosts.pop(number).kill()
        # the kernel takes it away too, but later: the host may come back before
        with contextlib.suppress(CannotBuild):
            self.switch.run("ip", "link", "delete", f"port{number}")

    def cut(self, number: int, *, silently: bool = False) -> None:
        """Pull out a cable; ``silently``, the host does not even see that: the switch carries nothing for it any more."""
        self.switch.run("ip", "link", "set", f"port{number}", *(["nomaster"] if silently else ["down"]))

    def heal(self, number: int) -> None:
        """Put it in again."""
        self.switch.run("ip", "link", "set", f"port{number}", "master", "br0", "up")

    def mount(self, number: int, source: Path, target: Path) -> None:
        """Give a host a directory of its own at a place that others have too."""
        self.hosts[number].run("mount", "--bind", str(source), str(target))

    @contextlib.contextmanager
    def slow(self, numbers: Sequence[int], *, seconds: float, loss: float) -> Iterator[None]:
        """Delay each frame that these hosts send or get, and lose a share of them."""
        relays = []
        try:
            for number in numbers:
                self.hosts[number].run(sys.executable, str(_RELAY), "checksum", "eth0")
                self.cut(number, silently=True)
                command = [sys.executable, str(_RELAY), "relay", f"port{number}", f"slow{number}", str(seconds), str(loss)]
                relay = subprocess.Popen(self.switch.inside(*command), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                relays.append(relay)
                assert relay.stdout is not None
                if relay.stdout.read(1) != b".":
                    raise CannotBuild(f"the relay of node{number} did not start")
                self.switch.run("ip", "link", "set", f"slow{number}", "master", "br0", "up")
            yield
        finally:
            for relay in relays:
                relay.communicate(timeout=60)
            for number in numbers:
                self.heal(number)

    def close(self) -> None:
        """Take everything away."""
        for host in [*self.hosts.values(), self.switch]:
            host.kill()
        self.hosts.clear()
