# SPDX-License-Identifier: Apache-2.0
"""The contest with DeepSpeed on one rank: both save, or load, in turns, round after round.

Time is taken from a barrier to when the slowest rank has finished. What DeepSpeed has saved is not durable when its call
returns, so the time until its files are flushed is taken as well. Before a save the file system is at rest, and the checkpoint
before is still there, as in training; before a load the files are in the page cache, and everything is overwritten.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist

from ..integrations.deepspeed import attach
from .deepspeed_workload import EngineWorkload
from .disk import bytes_read_by_process, empty, files_under, read_into_cache
from .launch import BenchmarkFailed, OnProgress, Progress

OURS, THEIRS, FLUSHED = "shardckpt", "DeepSpeed", "DeepSpeed + fsync"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineJob:
    """What a group of ranks has to do."""

    folder: str
    """Where each has a folder."""
    nbytes: int
    """Bytes of masters and moments on all ranks together."""
    stage: int
    """ZeRO stage."""
    rounds: int
    """Times that each takes its turn."""
    universal: str = ""
    """For loads: the tag of what DeepSpeed has converted."""


@dataclass(frozen=True, slots=True)
class EngineTurn:
    """One turn of one contestant."""

    who: str
    """Name."""
    seconds: float
    """Wall time of the slowest rank."""
    read: int = 0
    """Bytes that the rank that read most has asked the system for; of a save, 0."""
    wrong: tuple[str, ...] = ()
    """Tensors of rank 0 that were not given back as they were."""


@dataclass(slots=True)
class EngineOutcome:
    """What a group of ranks has to say of a job."""

    parameters: int
    """Number of parameters."""
    nbytes: int
    """Bytes of masters and moments on the rank that has most."""
    turns: list[EngineTurn] = field(default_factory=list)
    """All turns, in order."""


def folders(folder: str) -> tuple[str, str]:
    """Ours, and DeepSpeed's."""
    return os.path.join(folder, "ours"), os.path.join(folder, "theirs")


def tag_of(number: int) -> str:
    """Tag of what is saved in a round."""
    return f"round{number}"


def save_turns(report: OnProgress, job: EngineJob) -> EngineOutcome:
    """Time saves; ours are loaded again and checked. What the last round saves stays there."""
    workload = EngineWorkload(job.stage, job.nbytes)
    engine, (ours, theirs) = workload.engine, folders(job.folder)
    outcome = EngineOutcome(workload.parameters, _most(workload.nbytes))
    _clear(ours, theirs)
    with attach(engine, ours, keep_last=1, wait=True) as attachment:
        for number in range(1, job.rounds + 1):
            tag = tag_of(number)
            engine.global_steps += 1
            report(Progress(2 * number - 2, 2 * job.rounds, f"stage {job.stage}, round {number}: {OURS} saves"))
            _settle()
            outcome.turns.append(EngineTurn(OURS, _time(partial(attachment.save_checkpoint, ours, tag))))
            workload.poison()
            attachment.load_checkpoint(ours, tag)
            _require_right(workload, "a save")
            report(Progress(2 * number - 1, 2 * job.rounds, f"stage {job.stage}, round {number}: {THEIRS} saves"))
            _settle()
            seconds = _time(partial(type(engine).save_checkpoint, engine, theirs, tag))
            outcome.turns.append(EngineTurn(THEIRS, seconds))
            outcome.turns.append(EngineTurn(FLUSHED, seconds + _time(partial(_flush, os.path.join(theirs, tag)))))
            _keep_only(theirs, tag)
    return outcome


def load_turns(report: OnProgress, job: EngineJob) -> EngineOutcome:
    """Time loads of what other ranks have saved, and check them; only ours have to be right."""
    workload = EngineWorkload(job.stage, job.nbytes, universal=True)
    engine, (ours, theirs) = workload.engine, folders(job.folder)
    outcome = EngineOutcome(workload.parameters, _most(workload.nbytes))
    loads: dict[str, tuple[str, Callable[[], object]]] = {}
    with attach(engine, ours) as attachment:
        loads[OURS] = (ours, lambda: attachment.load_checkpoint(ours))
        loads[THEIRS] = (
            os.path.join(theirs, job.universal),
            lambda: type(engine).load_checkpoint(engine, theirs, tag=job.universal),
        )
        for number in range(job.rounds):
            for at, (who, (folder, load)) in enumerate(loads.items()):
                report(
                    Progress(2 * number + at, 2 * job.rounds, f"{dist.get_world_size()} ranks, round {number + 1}: {who} loads")
                )
                workload.poison()
                read_into_cache(folder)
                gc.collect()
                before = bytes_read_by_process()
                seconds = _time(load)
                read = _most(bytes_read_by_process() - before)
                if who == OURS:
                    _require_right(workload, "a load")
                outcome.turns.append(EngineTurn(who, seconds, read, tuple(workload.find_wrong())))
    return outcome


def _time(action: Callable[[], object]) -> float:
    """Seconds until the slowest rank has done it."""
    dist.barrier()
    begun = perf_counter()
    action()
    seconds = torch.tensor([perf_counter() - begun], dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds.item())


def _most(number: int) -> int:
    most = torch.tensor([number])
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most.item())


def _require_right(workload: EngineWorkload, what: str) -> None:
    wrong = workload.find_wrong()
    if _most(len(wrong)):
        raise BenchmarkFailed(f"{what} of {OURS} did not give back what was saved; rank {dist.get_rank()}: {wrong[:4]}")


def _clear(*places: str) -> None:
    """Begin with empty folders."""
    dist.barrier()
    if dist.get_rank() == 0:
        for place in places:
            Path(place).mkdir(exist_ok=True)
            empty(place)
    dist.barrier()


def _settle() -> None:
    """Let the file system come to rest."""
    gc.collect()
    dist.barrier()
    if dist.get_rank() == 0:
        os.sync()
    dist.barrier()


def _keep_only(folder: str, tag: str) -> None:
    """Remove older checkpoints of DeepSpeed; as in training, the last one is there until the next one is."""
    dist.barrier()
    if dist.get_rank() == 0:
        for place in Path(folder).iterdir():
            if place.is_dir() and place.name != tag:
                shutil.rmtree(place)


def _flush(folder: str) -> None:
    """Flush the files under ``folder`` and their directories, each rank a part of them."""
    names = [*files_under(folder), folder, *(str(path) for path in sorted(Path(folder).rglob("*")) if path.is_dir())]
    for name in names[dist.get_rank() :: dist.get_world_size()]:
        fd = os.open(name, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
