# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmarks that move data: starts the ranks, keeps the scratch folder, and draws up the report."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..errors import ConfigError
from .async_contest import AsyncJob, async_rounds
from .async_entrants import choose
from .async_report import AsyncReport, summarize_async
from .contest import Job, load_rounds, save_once, save_rounds
from .launch import OnProgress, Progress, run_ranks
from .machine import describe_machine
from .report import Case, Line, Report, describe_workload, summarize
from .spec import AsyncSpec, Cache, LoadSpec, ReshardSpec, SaveSpec

_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


def ignore_progress(progress: Progress) -> None:
    """Show nothing."""


def measure_save(spec: SaveSpec, folder: str = ".", on_progress: OnProgress = ignore_progress) -> Report:
    """Time durable saves. Files go under ``folder``, and are removed. Raises `BenchmarkFailed`."""
    with scratch_folder(folder, 2 * spec.nbytes) as scratch:
        job = Job(folder=scratch, nbytes=spec.nbytes, rounds=spec.rounds)
        outcome = run_ranks(spec.ranks, save_rounds, job, on_progress)[0]
        case = Case(from_ranks=spec.ranks, to_ranks=spec.ranks)
        lines = summarize(case, outcome)
        facts = describe_workload(spec, outcome.nbytes, outcome.num_tensors)
        return Report("save", describe_machine(scratch), facts, lines, outcome.ways, outcome.cold_by)


def measure_load(spec: LoadSpec, folder: str = ".", on_progress: OnProgress = ignore_progress) -> Report:
    """Time loads onto the layout that was saved, by new processes. Raises `BenchmarkFailed`."""
    return _measure_loads("load", spec, [(spec.ranks, 0)], spec.caches, folder, on_progress)


def measure_reshard(spec: ReshardSpec, folder: str = ".", on_progress: OnProgress = ignore_progress) -> Report:
    """Time loads onto other layouts, and count what they read. Raises `BenchmarkFailed`."""
    targets = [(ranks, dim) for dim in spec.dims for ranks in spec.to_ranks]
    return _measure_loads("reshard", spec, targets, spec.caches, folder, on_progress)


def measure_async(spec: AsyncSpec, folder: str = ".", on_progress: OnProgress = ignore_progress) -> AsyncReport:
    """Time what saves cost training. Raises `BenchmarkFailed`, but not for a contestant that fails: the report says so."""
    device = _choose_device(spec)
    entrants = choose(spec.contestants, cuda=device == "cuda")
    with scratch_folder(folder, (spec.saves + 2) * spec.nbytes) as scratch:
        job = AsyncJob(
            folder=scratch,
            nbytes=spec.nbytes,
            rounds=spec.rounds,
            saves=spec.saves,
            steps=spec.steps,
            samples=spec.samples,
            contestants=spec.contestants,
            device=device,
        )
        outcome = run_ranks(spec.ranks, async_rounds, job, on_progress, backend=_BACKENDS[device])[0]
        facts = describe_workload(spec, outcome.nbytes, outcome.num_tensors)
        return summarize_async(outcome, entrants, describe_machine(scratch), facts, device)


def _choose_device(spec: AsyncSpec) -> str:
    gpus = torch.cuda.device_count()
    if spec.device == "cuda" and gpus < spec.ranks:
        raise ConfigError(f"device='cuda' needs a GPU for each of {spec.ranks} ranks, and torch finds {gpus} here; take 'cpu'")
    return "cuda" if gpus >= spec.ranks and spec.device != "cpu" else "cpu"


def _measure_loads(
    benchmark: str,
    spec: SaveSpec,
    targets: Sequence[tuple[int, int]],
    caches: Sequence[Cache],
    folder: str,
    on_progress: OnProgress,
) -> Report:
    with scratch_folder(folder, 4 * spec.nbytes) as scratch:
        saving = Job(folder=scratch, nbytes=spec.nbytes)
        saved = run_ranks(spec.ranks, save_once, saving, on_progress)[0]
        lines: list[Line] = []
        ways: dict[str, str] = {}
        for ranks, dim in targets:
            job = Job(folder=scratch, nbytes=spec.nbytes, rounds=spec.rounds, caches=tuple(caches), dim=dim)
            outcome = run_ranks(ranks, load_rounds, job, on_progress)[0]
            lines += summarize(Case(from_ranks=spec.ranks, to_ranks=ranks, dim=dim), outcome)
            ways |= {f"{what}_{ranks}_ranks": way for what, way in outcome.ways.items()}
        facts = describe_workload(spec, saved.nbytes, saved.num_tensors)
        return Report(benchmark, describe_machine(scratch), facts, lines, ways, outcome.cold_by)


@contextmanager
def scratch_folder(folder: str, nbytes: int) -> Iterator[str]:
    """A new folder in ``folder``, with room for ``nbytes`` bytes, which is gone afterwards whatever happens."""
    try:
        free = shutil.disk_usage(folder).free
        scratch = tempfile.mkdtemp(prefix="shardckpt-bench-", dir=folder)
    except OSError as error:
        raise ConfigError(f"cannot make a folder in {folder!r}: {error.strerror}; give a writable one with --dir") from None
    try:
        if free < nbytes:
            raise ConfigError(
                f"{folder!r} has {free / 1e9:.1f} GB free, and the files need {nbytes / 1e9:.1f} GB for a while; "
                "choose a smaller --size or another --dir"
            )
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
