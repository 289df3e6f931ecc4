# SPDX-License-Identifier: Apache-2.0
"""A cable is pulled out in each phase of a save: who waits gives up in time, by name, and nothing is committed in part."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

import shardckpt
from shardckpt import CheckpointError, CoordinationError, Options, RankTimeout
from tests.engine.stores import checkpointer
from tests.nodes.cluster import PATIENCE, Cluster, come_to
from tests.nodes.gates import Gated
from tests.nodes.test_saves import LONG, a_part

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TIMEOUT = 8.0
"""Seconds after which ranks give up. All of them are at their gates when the cable is pulled out."""
LANES = ("tables", "writing", "receipt", "background", "process", "restore", "commit")
"""Phases of a save, each with a checkpointer of its own, that are cut off all at once; and a restore."""

Outcome = int | CheckpointError
"""The step that was saved or restored, or the error."""


class Lane:
    """One checkpointer on one rank, which is stopped in a phase of its save of step 2."""

    def __init__(self, place: Path, name: str) -> None:
        self._place = place
        self._name = name
        self._rank = dist.get_rank()
        self._outcome: Outcome = 0
        self.root = place / name
        if name == "process":
            before = {child.pid for child in psutil.Process().children()}
            self.ckpt = shardckpt.Checkpointer(self.root, options=Options(background="process", timeout=TIMEOUT))
            (self._pid,) = {child.pid for child in psutil.Process().children()} - before
        else:
            phase = {"background": "writing"}.get(name, name)
            self._fs = Gated(str(self.root), phase, self._come)
            self.ckpt = checkpointer(self.root, self._fs, timeout=TIMEOUT)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _come(self) -> None:
        come_to(self._place, self._name, self._rank)

    def start(self) -> None:
        """Save, up to the gate."""
        self._thread.start()

    def end(self) -> Outcome:
        """What has become of it, when the checkpointer is closed too."""
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            raise TimeoutError(f"{self._name} does not come to its end on rank {self._rank}")
        return self._outcome

    def _run(self) -> None:
        try:
            self._outcome = self._go()
        except CheckpointError as error:
            self._outcome = error
        self.ckpt.close()

    def _go(self) -> int:
        if self._name == "process":
            if self._rank == 0:
                # only what listens already can be met
                self.ckpt._background._carrier._process.wait_for_port()  # type: ignore[attr-defined]
            os.kill(self._pid, signal.SIGSTOP)
            try:
                handle = self.ckpt.save(2, a_part(2))
                handle.wait_staged(PATIENCE)
                self._come()
            finally:
                os.kill(self._pid, signal.SIGCONT)
            return handle.result(PATIENCE).step
        if self._name in ("tables", "restore"):
            self._come()
        if self._name == "restore":
            restored = self.ckpt.restore(a_part(0))
            return restored.step if restored is not None else 0
        # at the commit only rank 0 has something to do
        self._fs.armed = self._name != "commit" or self._rank == 0
        return self.ckpt.save(2, a_part(2), wait=self._name != "background").result(PATIENCE).step


def connect(place: Path) -> Outcome:
    """What becomes of a checkpointer that is made beside the cut."""
    come_to(place, "connect", dist.get_rank())
    try:
        shardckpt.Checkpointer(place / "connect", options=Options(timeout=TIMEOUT)).close()
    except CheckpointError as error:
        return error
    return 0


def save_over_a_cut(place: Path) -> tuple[dict[str, Outcome], int]:
    """What becomes of each lane, and the step that is saved when the cable is in its place again."""
    for name in LANES:
        # with patience, as nothing is cut yet
        with shardckpt.Checkpointer(place / name, options=Options(timeout=LONG)) as ckpt:
            ckpt.save(1, a_part(1), wait=True)
    come_to(place, "begin", dist.get_rank())
    lanes = [Lane(place, name) for name in LANES]
    for lane in lanes:
        lane.start()
    outcomes = {"connect": connect(place)} | {name: lane.end() for name, lane in zip(LANES, lanes, strict=True)}
    come_to(place, "healed", dist.get_rank())
    with shardckpt.Checkpointer(place / "tables", options=Options(timeout=LONG)) as ckpt:
        return outcomes, ckpt.save(3, a_part(3)).result(PATIENCE).step


def require_named(error: Outcome, ranks: list[int], hosts: tuple[str, ...]) -> None:
    """The error is about these ranks, and says where they are."""
    assert isinstance(error, RankTimeout), error
    assert error.ranks == ranks
    for rank in ranks:
        assert f"{rank} ({hosts[rank]})" in error.message


@pytest.mark.parametrize(("victim", "silently"), [(2, False), (0, True)])
def test_a_cable_is_pulled_out_in_each_phase(cluster: Cluster, victim: int, silently: bool) -> None:
    """That of a host with one rank; and that of the host with ranks 0 and 1, where all others meet."""
    lost = [rank for rank, host in enumerate(cluster.HOSTS) if host == f"node{victim}"]
    with cluster.case(save_over_a_cut) as case:
        case.until_reached("begin", 4)
        case.open("begin")
        for gate in ("connect", *LANES):
            case.until_reached(gate, 1 if gate == "commit" else 4)
        cluster.network.cut(victim, silently=silently)
        try:
            for gate in ("connect", *LANES):
                case.open(gate)
            case.until_reached("healed", 4)
        finally:
            cluster.network.heal(victim)
        case.open("healed")
        found = case.results()

    here = [rank for rank in range(4) if (rank in lost) == (0 in lost)]
    there = [rank for rank in range(4) if rank not in here]
    for rank, (outcomes, after) in enumerate(found):
        # rank 0 had all that it takes for the commit, and only those who cannot hear of it do not know
        commit, connected = outcomes.pop("commit"), outcomes.pop("connect")
        if rank in here:
            assert commit == 2
            assert isinstance(connected, RankTimeout)
            assert connected.ranks == there
        else:
            require_named(commit, [0], cluster.HOSTS)
            assert isinstance(connected, CoordinationError)
        for error in outcomes.values():
            require_named(error, there if rank in here else [0], cluster.HOSTS)
        assert after == 3
    for name in LANES:
        expected = {"tables": [1, 3], "commit": [1, 2]}.get(name, [1])
        with shardckpt.Checkpointer(case.place / name) as ckpt:
            assert ckpt.steps() == expected
        for step in expected:
            state = shardckpt.load(case.place / name / f"step-{step:08}").state
            assert state["t"].tolist() == [float(step)] * 1000
            assert [own.unique().tolist() for own in state["own"].values()] == [[10 * step + rank] for rank in range(4)]
