# SPDX-License-Identifier: Apache-2.0
"""Jobs of torchrun on the hosts of a network: one agent on each, which meet at the switch."""

from __future__ import annotations

import contextlib
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from shardckpt.errors import CheckpointError
from tests.engine.waiting import until
from tests.nodes.network import SWITCH, Network, Space

PATIENCE = 250.0
"""Seconds; only a broken engine or launcher uses them up."""
_PORT = 29400


class Launcher:
    """Starts agents; where they meet stays, whichever host dies."""

    def __init__(self, network: Network, directory: Path) -> None:
        self.network = network
        self._directory = directory
        self._output: IO[bytes] = (directory / "output").open("ab")
        # at the switch, as on a job's head node: no host is needed by the others' agents
        command = [sys.executable, "-m", "shardckpt", "rendezvous", f"--port={_PORT}"]
        self._meeting = network.switch.start(*command, log=self._output)

    def start(
        self,
        host: Space,
        script: Path,
        *arguments: str,
        job: str,
        nnodes: str,
        workers: int = 1,
        restarts: int = 0,
        conf: Mapping[str, object] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start the agent of one host."""
        settings = ",".join(f"{key}={value}" for key, value in {"is_host": 0, "join_timeout": 900, **(conf or {})}.items())
        command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nnodes}", f"--nproc-per-node={workers}"]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={SWITCH}:{_PORT}", f"--rdzv-conf={settings}"]
        command += [f"--rdzv-id={job}", f"--max-restarts={restarts}", str(script), *arguments]
        environment = {"TMPDIR": str(self._directory)}
        if ":" in nnodes:
            # When agents share one store with their workers, they tell where it is in the first round only (torch 2.13):
            # a node that joins later asks for it in vain.
            environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        return host.start(*command, log=self._output, environment=environment)

    def output(self) -> str:
        """The end of what agents and workers have printed."""
        return (self._directory / "output").read_text(errors="replace")[-20_000:]

    def close(self) -> None:
        """No more agents."""
        self._meeting.kill()
        self._meeting.wait()
        self._output.close()


class Cluster:
    """Ranks on three hosts, two on ``node0`` and one on each other, that call functions as `tests.ranks` lets ranks do.

    They share ``directory``, whatever becomes of the network.
    """

    HOSTS = ("node0", "node0", "node1", "node2")
    """By rank."""

    def __init__(self, network: Network, launcher: Launcher, directory: Path) -> None:
        self.network = network
        self.directory = directory
        self._launcher = launcher
        self._cases = 0
        script = Path(__file__).with_name("serve.py")
        self._agents = [
            launcher.start(host, script, str(directory), job="cluster", nnodes="3", workers=self.HOSTS.count(host.name))
            for host in network.hosts.values()
        ]

    @contextlib.contextmanager
    def case(self, fn: Callable[..., Any], *args: Any) -> Iterator[Case]:
        """Have ``fn(case directory, *args)`` called on all ranks; wait for its end at the end of the block."""
        place = self.directory / f"case-{self._cases}"
        place.mkdir()
        call = place / "call"
        call.with_suffix(".new").write_bytes(pickle.dumps((fn, args)))
        call.with_suffix(".new").rename(call)
        self._cases += 1
        case = Case(place, len(self.HOSTS), self._require_running)
        yield case
        case.results()

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``fn(case directory, *args)`` on all ranks, and return the results by rank."""
        with self.case(fn, *args) as case:
            return case.results()

    def _require_running(self) -> None:
        ended = [agent.returncode for agent in self._agents if agent.poll() is not None]
        if ended:
            raise AssertionError(f"an agent has ended with {ended[0]}:\n{self._launcher.output()}")

    def close(self) -> None:
        """Stop the ranks."""
        for agent in self._agents:
            agent.send_signal(signal.SIGKILL)
            agent.wait(60)


class Case:
    """One call on all ranks, as pytest sees it."""

    def __init__(self, place: Path, size: int, look: Callable[[], None]) -> None:
        self.place = place
        self._size = size
        self._look = look

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait, as long as the ranks are there."""

        def holds() -> bool:
            self._look()
            return condition()

        until(holds, PATIENCE)

    def until_reached(self, gate: str, ranks: int) -> None:
        """Wait until so many ranks stand in front of a gate."""
        self.until(lambda: len(list(self.place.glob(f"{gate}.reached-*"))) >= ranks)

    def open(self, gate: str) -> None:
        """Let through whoever comes to a gate."""
        (self.place / f"{gate}.open").touch()

    def results(self) -> list[Any]:
        """What the ranks have returned, by rank; raises `AssertionError` with the tracebacks of those that raised."""
        files = [self.place / f"result-{rank}" for rank in range(self._size)]
        self.until(lambda: all(file.exists() for file in files))
        found = [pickle.loads(file.read_bytes()) for file in files]
        failed = [f"--- rank {rank}:\n{trace}" for rank, (_, trace) in enumerate(found) if trace]
        if failed:
            raise AssertionError("\n".join(failed))
        return [value for value, _ in found]


# What follows runs in the ranks.


def come_to(place: Path, gate: str, rank: int) -> None:
    """Stand in front of a gate until it is open."""
    (place / f"{gate}.reached-{rank}").touch()
    until(lambda: (place / f"{gate}.open").exists(), PATIENCE)


def serve(directory: Path, rank: int) -> None:
    """Take part in one case after the other."""
    number = 0
    while True:
        place = directory / f"case-{number}"
        until((place / "call").exists, 24 * 3600.0)
        value, trace = None, ""
        try:
            fn, args = pickle.loads((place / "call").read_bytes())
            value = fn(place, *args)
        except BaseException:
            trace = traceback.format_exc()
        result = place / f"result-{rank}"
        result.with_suffix(".new").write_bytes(pickle.dumps((value, trace)))
        result.with_suffix(".new").rename(result)
        number += 1


def told(error: CheckpointError) -> str:
    """An error in one line, for messages of tests."""
    return f"{type(error).__name__}: {error}"
