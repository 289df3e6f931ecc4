# SPDX-License-Identifier: Apache-2.0
"""A job of torchrun with ``--nnodes=1:3`` loses a node in the middle of a save, again and again, and goes on by itself."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.elastic_proof import begun, prove_directory, read_start
from tests.engine.waiting import until
from tests.nodes.cluster import Launcher
from tests.nodes.network import Network, why_not

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

_PAUSE = 0.1
PATIENCE = 600.0
"""Seconds; torchrun's agents lose and find each other several times where processor time is short."""
SCRIPT = Path(__file__).with_name("train.py")
# The others take a node for dead after 15 s without a sign of life, and wait 4 s for more nodes when they have met.
CONF = {"last_call_timeout": 4, "keep_alive_interval": 1, "keep_alive_max_attempt": 15}


class Job:
    """A job with an agent on each node, and what it has written down."""

    def __init__(self, network: Network, launcher: Launcher, directory: Path) -> None:
        self.network = network
        self.directory = directory
        self._launcher = launcher
        self._agents: dict[int, subprocess.Popen[bytes]] = {}
        self._cut: dict[int, subprocess.Popen[bytes]] = {}
        for number in network.hosts:
            self.join(number)

    def join(self, number: int) -> None:
        """Start the agent of a node."""
        host = self.network.hosts[number]
        self._agents[number] = self._launcher.start(
            host, SCRIPT, str(self.directory), job="elastic", nnodes="1:3", restarts=100, conf=CONF
        )

    def cut(self, number: int) -> None:
        """Cut a node off; whatever its agent makes of that."""
        self._cut[number] = self._agents.pop(number)
        self.network.cut(number)

    def heal(self, number: int) -> None:
        """Put its cable in again. Its agent joins the others, or has given up meanwhile; then it is started again."""
        self.network.heal(number)
        agent = self._cut.pop(number)
        self.until(lambda: agent.poll() is not None or self._is_training(3))
        if agent.poll() is None:
            self._agents[number] = agent
        else:
            self.join(number)

    def leave(self, number: int) -> None:
        """Kill a node, and start it again without its agent."""
        agent = self._agents.pop(number)
        self.network.kill(number)
        agent.wait(60)
        self.network.boot(number)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait, as long as all agents are there."""

        def holds() -> bool:
            # looking costs time that the job needs
            time.sleep(_PAUSE)
            ended = {number: agent.returncode for number, agent in self._agents.items() if agent.poll() is not None}
            if any(ended.values()):
                raise AssertionError(f"agents ended: {ended}\n{self._launcher.output()}")
            return condition()

        try:
            until(holds, PATIENCE)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self._launcher.output()}") from None

    def until_training(self, ranks: int) -> None:
        """Wait until the newest start is one of so many ranks, and has saved."""
        self.until(lambda: self._is_training(ranks))

    def _is_training(self, ranks: int) -> bool:
        count = begun(self.directory)
        newest = read_start(self.directory, count - 1) if count else None
        return newest is not None and newest.ranks == ranks and bool(newest.saved)

    def ambush(self, name: str, phase: str, ranks: int) -> Path:
        """Have the next save of three ranks stopped in a phase; returns when so many ranks are at the gate."""
        order = self.directory / "ambush"
        order.with_suffix(".new").write_text(json.dumps({"name": name, "phase": phase}))
        order.with_suffix(".new").rename(order)
        found: list[Path] = []

        def is_reached() -> bool:
            places = (self.directory / name).glob("*")
            found[:] = [place for place in places if len(list(place.glob(f"{phase}.reached-*"))) >= ranks]
            return bool(found)

        self.until(is_reached)
        order.unlink()
        return found[0]

    def end(self) -> None:
        """Have it save once more, and end."""
        (self.directory / "stop").touch()
        self.until(lambda: all(agent.poll() == 0 for agent in self._agents.values()))

    def close(self) -> None:
        """Kill it."""
        for agent in [*self._agents.values(), *self._cut.values()]:
            agent.kill()
            agent.wait(60)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    network = Network(3, tmp_path)
    try:
        launcher = Launcher(network, tmp_path)
        directory = tmp_path / "job"
        directory.mkdir()
        job = Job(network, launcher, directory)
        yield job
        job.close()
        launcher.close()
    finally:
        network.close()


def test_nodes_that_die_in_a_save_and_come_back(job: Job) -> None:
    job.until_training(3)
    # phase, how many ranks come to it, which node goes, and whether it is only its cable: then its processes live on
    for phase, ranks, victim, is_cut in (("writing", 3, 2, False), ("commit", 1, 0, False), ("receipt", 3, 1, True)):
        place = job.ambush(phase, phase, ranks)
        step = int(place.name)
        if is_cut:
            job.cut(victim)
        else:
            job.leave(victim)
        (place / f"{phase}.open").touch()
        left = [rank for rank in range(3) if rank != victim or is_cut]
        job.until(lambda place=place, left=left: all((place / f"named-{rank}").exists() for rank in left))  # type: ignore[misc]
        named = {rank: json.loads((place / f"named-{rank}").read_text()) for rank in left}
        assert named == {rank: [0] if rank == victim else [victim] for rank in left}
        assert not list((job.directory / "run" / f"step-{step:08}").glob("manifest.json"))
        (place / "told.open").touch()
        job.until_training(2)
        if is_cut:
            job.heal(victim)
        else:
            job.join(victim)
        job.until_training(3)
    job.end()
    starts, proof = prove_directory(job.directory)
    assert starts[-1].ranks == 3
    assert proof.epochs > 0
