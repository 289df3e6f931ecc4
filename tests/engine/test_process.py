# SPDX-License-Identifier: Apache-2.0
"""The background process: what it is, where it can be started from, and that losing it costs one save at most."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt import ConfigError, Options
from shardckpt.background.messages import Setup
from shardckpt.background.process import BackgroundProcess, ProcessCarrier, settle
from shardckpt.errors import BackgroundDied, CheckpointError, CoordinationError, RankTimeout, StorageFull, StoreError
from shardckpt.feed import Feed
from shardckpt.finish import Job
from shardckpt.guard import STEP_GUARD
from shardckpt.layout import Mesh, MeshLayout, Replicate
from shardckpt.manifest import manifest_digest
from shardckpt.store import MemoryStore
from tests.engine.simulate import ATTEMPT, by_hand, save
from tests.engine.stores import CHUNK, a_state, equal, files, large, loaded
from tests.engine.usage import MARK, marked_processes
from tests.engine.waiting import InThread, until, until_blocked
from tests.models import make_job
from tests.ranks import RankPool
from tests.style.source import ROOT

PATIENCE = 120.0
LONG = 600.0
"""Seconds that ranks wait for each other: much longer than the tests do."""


def checkpointer(root: Path | str, **options: Any) -> shardckpt.Checkpointer:
    return shardckpt.Checkpointer(root, options=Options(background="process", timeout=LONG, **options))


def background_process() -> psutil.Process:
    """The one of this process."""

    def find() -> list[psutil.Process]:
        return [child for child in psutil.Process().children() if "shardckpt.background" in child.cmdline()]

    until(find)
    (found,) = find()
    return found


def kill(process: psutil.Process) -> None:
    """Kill, and wait until all threads of it are dead; the engine has to be told of its end by the system."""
    process.kill()
    with suppress(ChildProcessError):
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


# ---- what it is


def test_it_stands_apart_from_the_trainer(tmp_path: Path) -> None:
    """Launchers kill process groups; and training goes first."""
    with checkpointer(tmp_path) as ckpt:
        process = background_process()
        ckpt.save(1, a_state(1)).result(PATIENCE)
        assert os.getsid(process.pid) == os.getpgid(process.pid) == process.pid
        assert process.nice() == min(19, psutil.Process().nice() + 10)
        assert background_process() == process
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(process.pid, number)
        ckpt.save(2, a_state(2)).result(PATIENCE)
        assert background_process() == process
    assert not process.is_running()


def test_a_store_in_this_process_is_refused() -> None:
    before = psutil.Process().children()
    with pytest.raises(ConfigError, match=r"lies in the memory of this process.* take background='thread'"):
        checkpointer("memory://nowhere")
    assert psutil.Process().children() == before


@pytest.mark.slow
def test_the_root_is_a_place_and_not_a_name(tmp_path: Path) -> None:
    """Neither a change of the working directory nor strange characters matter."""
    home = os.getcwd()
    os.chdir(tmp_path)
    try:
        with checkpointer("my runs/a b#c%20é") as ckpt:
            os.chdir("/")
            ckpt.save(1, a_state(1)).result(PATIENCE)
            with checkpointer(f"file://{tmp_path}/as%20url") as other:
                other.save(1, a_state(1)).result(PATIENCE)
    finally:
        os.chdir(home)
    assert loaded(tmp_path / "my runs/a b#c%20é", 1)["step"] == 1
    assert loaded(tmp_path / "as url", 1)["step"] == 1


TRAINER = """
import sys, torch
sys.path.insert(0, {source!r})
import shardckpt
ckpt = shardckpt.Checkpointer({root!r}, options=shardckpt.Options(background="process"))
ckpt.save(1, {{"t": torch.ones(3)}})
"""


@pytest.mark.slow
def test_it_finds_what_the_trainer_has_found(tmp_path: Path) -> None:
    """Also where the trainer is no file, the package is not installed, and the working directory is full of traps."""
    (tmp_path / "torch.py").write_text("raise ImportError('this is not torch')")
    (tmp_path / "json.py").write_text("raise ImportError('this is not json')")
    script = TRAINER.format(source=str(ROOT), root=str(tmp_path / "run"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-"], input=script, env=environment, cwd=tmp_path, timeout=120, text=True)
    assert done.returncode == 0
    assert loaded(tmp_path / "run", 1)["t"].tolist() == [1.0] * 3


FORKING = """
import os, signal, sys, time, torch, shardckpt
ckpt = shardckpt.Checkpointer(sys.argv[1], options=shardckpt.Options(background="process"))
ckpt.save(1, {"t": torch.ones(3)}).result()
if os.fork() == 0:
    time.sleep(600)
ckpt.save(2, {"t": torch.ones(3)}).wait_staged()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_children_of_a_dead_trainer_do_not_keep_it_alive(tmp_path: Path) -> None:
    """Such as those of data loaders, which have all that the trainer had open."""
    mark = "forked"
    environment = {**os.environ, MARK: mark, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", FORKING, str(tmp_path)], env=environment, timeout=120)
    until(lambda: len(marked_processes(mark)) == 1)
    (child,) = marked_processes(mark)
    assert "shardckpt.background" not in child.cmdline()
    child.kill()
    assert shardckpt.load(tmp_path).step == 2


# ---- losing it


class Forking:
    """Memory that looks as if another thread forks while the process is started: somebody keeps all sockets open."""

    def __init__(self) -> None:
        self.kept: list[int] = []

    @property
    def fd(self) -> int:
        self.kept += [os.dup(int(fd)) for fd in os.listdir("/proc/self/fd") if link(fd).startswith("socket:")]
        return 0


def link(fd: str) -> str:
    """What a descriptor stands for; "" when it is gone."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def test_its_end_is_noticed_although_others_hold_its_line_open(tmp_path: Path) -> None:
    memory = Forking()
    setup = Setup(url=str(tmp_path), trainer=os.getpid(), rank=0, world_size=1, hosts=("a",), timeout=PATIENCE, workers=1)
    process = BackgroundProcess(setup, memory)  # type: ignore[arg-type]  # it needs no more of it
    try:
        kill(background_process())
        process._listener.join(PATIENCE)
        assert not process._listener.is_alive()
        assert process.describe_end() == "was killed by signal 9"
    finally:
        for fd in memory.kept:
            os.close(fd)
        process.close()


def a_part(step: int) -> dict[str, Any]:
    return a_state(step, rank=shardckpt.PerRank(torch.full((5,), dist.get_rank() + step)))


def lose_between_saves(root: str, victims: list[int]) -> list[int]:
    with checkpointer(root) as ckpt:
        ckpt.save(1, a_part(1)).result(PATIENCE)
        if dist.get_rank() in victims:
            kill(background_process())
        dist.barrier()
        return [ckpt.save(step, a_part(step)).result(PATIENCE).step for step in (2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("victims", [[0], [1], [0, 1]])
def test_a_process_that_dies_between_saves_is_replaced(ranks: RankPool, tmp_path: Path, victims: list[int]) -> None:
    assert ranks.run(2, lose_between_saves, str(tmp_path), victims, timeout=250) == [[2, 3]] * 2


def outcome(handle: shardckpt.SaveHandle) -> CheckpointError | None:
    try:
        handle.result(PATIENCE)
    except CheckpointError as error:
        return error
    return None


def lose_in_a_save(root: str, victims: list[int]) -> list[Any]:
    """The victims' processes are killed before they have done anything for save 2, which all ranks have staged."""
    with checkpointer(root) as ckpt:
        ckpt.save(1, a_part(1)).result(PATIENCE)
        is_victim, process = dist.get_rank() in victims, background_process()
        dist.barrier()
        if is_victim:
            process.suspend()
        handle = ckpt.save(2, a_part(2))
        handle.wait_staged(PATIENCE)
        dist.barrier()
        if is_victim:
            kill(process)
        error = outcome(handle)
        return [error, ckpt.save(2, a_part(4)).result(PATIENCE).step, ckpt.save(3, a_part(3)).result(PATIENCE).step]


@pytest.mark.parametrize("victims", [[1], pytest.param([1, 2], marks=pytest.mark.slow)])
def test_a_process_that_dies_in_a_save_is_named_on_all_ranks(ranks: RankPool, tmp_path: Path, victims: list[int]) -> None:
    """And soon, however long ranks may keep each other waiting. The next save has a new process."""
    how = "was killed by signal 9 in the save of step 2"
    for rank, found in enumerate(ranks.run(max(victims) + 1, lose_in_a_save, str(tmp_path), victims, timeout=250)):
        assert found[1:] == [2, 3]
        assert isinstance(found[0], BackgroundDied)
        if rank in victims:
            assert found[0].message == f"the background process of rank {rank} {how}"
        else:
            assert found[0].message.startswith(f"rank 1: the background process of rank 1 {how}")
    assert loaded(tmp_path, 2)["step"] == 4


class Late(shardckpt.Checkpointer):
    """What is staged lazily is not copied before a step waits for it."""

    _LAZY_THREADS = 0


def lose_the_first_in_a_save(root: str) -> list[Any]:
    """Rank 0's process is killed while it waits for rank 0 to stage save 2, and rank 1 has written its file."""
    job, is_first = make_job("fsdp2"), dist.get_rank() == 0
    job.train(1)
    kind = Late if is_first else shardckpt.Checkpointer
    with kind(root, options=Options(background="process", stage="lazy", timeout=LONG)) as ckpt:
        ckpt.save(1, job.state(), wait=True)
        handle = ckpt.save(2, job.state())
        if is_first:
            until(lambda: list(Path(root).glob("step-00000002/rank-00001-*")))
            kill(background_process())
        error = outcome(handle)
        dist.barrier()
        job.train(1)
        found: list[Any] = [error]
        for step in (2, 3):
            again = ckpt.save(step, job.state())
            STEP_GUARD.wait()
            found.append(again.result(PATIENCE).step)
        return found


@pytest.mark.slow
def test_the_process_of_rank_0_dies_in_a_save(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks.run(2, lose_the_first_in_a_save, str(tmp_path), timeout=250)
    assert isinstance(first[0], BackgroundDied)
    assert first[0].message == "the background process of rank 0 was killed by signal 9 in the save of step 2"
    assert isinstance(second[0], RankTimeout)
    assert second[0].ranks == [0]
    assert first[1:] == second[1:] == [2, 3]


@pytest.mark.slow
def test_a_process_that_dies_in_the_middle_of_a_ring_ends_the_call(tmp_path: Path) -> None:
    with checkpointer(tmp_path, host_memory_limit=CHUNK) as ckpt:
        ckpt.save(1, a_state(1)).result(PATIENCE)
        process = background_process()
        process.suspend()
        saving = InThread(lambda: ckpt.save(2, large(3.4)))
        until_blocked(saving, Feed.room)
        carrier = ckpt._background._carrier
        assert isinstance(carrier, ProcessCarrier)
        # the process has been told, although it has not listened yet
        until(carrier._items.empty)
        kill(process)
        with pytest.raises(BackgroundDied, match="was killed by signal 9 in the save of step 2"):
            saving.result().result(PATIENCE)
        ckpt.save(3, large(3.4)).result(PATIENCE)
    assert equal(loaded(tmp_path, 3), large(3.4))


def test_a_process_that_dies_while_it_is_waited_for(tmp_path: Path) -> None:
    """A close does not wait for what will never come."""
    ckpt = checkpointer(tmp_path)
    ckpt.save(1, a_state(1)).result(PATIENCE)
    process = background_process()
    process.suspend()
    handle = ckpt.save(2, a_state(2))
    closing = InThread(ckpt.close)
    kill(process)
    closing.result()
    assert isinstance(handle.error, BackgroundDied)
    assert ckpt.steps() == [1]


def test_a_commit_that_nobody_told_of_is_found() -> None:
    """When a process dies right after it, on the rank itself or on rank 0."""
    store = MemoryStore("untold")
    plan = by_hand(1, {"t": ("uint8", MeshLayout((3,), Mesh((0,), (1,)), (Replicate(),)), (0, 1))})
    saved = save(store, plan, "step-00000007/")
    died, late = BackgroundDied("it was killed", rank=1), RankTimeout("it is gone", ranks=[0])
    others_late, full = RankTimeout("it is late", ranks=[1]), StorageFull("no space")
    alone = CoordinationError("it cannot tell the others", rank=0, outcome="unknown")
    # a flush that has failed may well succeed when it is tried again, with nothing written
    unflushed = StoreError("it cannot be flushed", outcome="unknown")

    def job(step: int, attempt: str) -> Job:
        return Job(prefix=f"step-{step:08}/", step=step, attempt=attempt, header=b"", block_size=1, draft=None)

    for told in (died, late, alone):
        assert settle(store, job(7, ATTEMPT), told) == manifest_digest(saved.manifest)
    open_ends: list[tuple[CheckpointError, Job]] = [(died, job(8, ATTEMPT)), (late, job(7, "fedcba9876543210"))]
    for error, unsaved in [*open_ends, *((error, job(7, ATTEMPT)) for error in (others_late, full, unflushed))]:
        with pytest.raises(type(error)) as caught:
            settle(store, unsaved, error)
        assert caught.value is error


def fail_to_write(root: str, bad: int) -> list[CheckpointError | None]:
    """The process of rank ``bad`` may write nothing in save 2."""
    with checkpointer(root) as ckpt:
        ckpt.save(1, a_part(1)).result(PATIENCE)
        process, is_bad = background_process(), dist.get_rank() == bad
        if is_bad:
            process.rlimit(psutil.RLIMIT_FSIZE, (0, -1))
        handle = ckpt.save(2, a_part(2))
        ckpt.wait()
        if is_bad:
            process.rlimit(psutil.RLIMIT_FSIZE, (-1, -1))
        dist.barrier()
        ckpt.save(3, a_part(3)).result(PATIENCE)
        return [handle.error]


@pytest.mark.slow
@pytest.mark.parametrize("bad", [0, 1])
def test_errors_of_its_storage_are_heard_by_all(ranks: RankPool, tmp_path: Path, bad: int) -> None:
    for rank, (error,) in enumerate(ranks.run(2, fail_to_write, str(tmp_path), bad, timeout=250)):
        assert isinstance(error, StoreError)
        assert not isinstance(error, StorageFull)
        assert "EFBIG" in error.message
        assert error.message.startswith(f"rank {bad}: ") == (rank != bad)
    assert {name[:13] for name in files(tmp_path)} == {"step-00000001", "step-00000003"}
