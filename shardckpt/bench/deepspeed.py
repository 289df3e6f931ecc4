# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmark beside DeepSpeed: saves at each stage, conversions in processes of their own, loads on fewer ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from .deepspeed_contest import OURS, THEIRS, EngineJob, folders, load_turns, save_turns, tag_of
from .deepspeed_report import (
    Conversion,
    EngineLine,
    EngineReport,
    compare,
    lines_of_conversions,
    lines_of_loads,
    lines_of_saves,
)
from .deepspeed_workload import require_deepspeed
from .launch import BenchmarkFailed, OnProgress, Progress, run_ranks
from .machine import describe_machine
from .measure import ignore_progress, scratch_folder
from .memory import MemoryWatch, memory_now
from .spec import DeepSpeedSpec

_STAGES = (1, 2, 3)
_PAUSE_SECONDS = 0.05


def measure_deepspeed(spec: DeepSpeedSpec, folder: str = ".", on_progress: OnProgress = ignore_progress) -> EngineReport:
    """Save, convert, import and resume, each beside DeepSpeed. Files go under ``folder``, and are removed.

    Raises `ConfigError` without DeepSpeed, `BenchmarkFailed` when we do not give back what was saved, or a command fails.
    """
    version = require_deepspeed()
    lines: list[EngineLine] = []
    with scratch_folder(folder, 6 * spec.nbytes) as scratch:
        for stage in _STAGES:
            job = EngineJob(folder=scratch, nbytes=spec.nbytes, stage=stage, rounds=spec.rounds)
            saved = run_ranks(spec.ranks, save_turns, job, on_progress)[0]
            lines += lines_of_saves(stage, saved)
        universal, conversions = _convert(spec, scratch, on_progress)
        job = EngineJob(folder=scratch, nbytes=spec.nbytes, stage=3, rounds=spec.rounds, universal=universal)
        for ranks in sorted({spec.ranks, spec.to_ranks}, reverse=True):
            lines += lines_of_loads(ranks, run_ranks(ranks, load_turns, job, on_progress)[0])
        lines += lines_of_conversions(conversions)
        return EngineReport(
            machine=describe_machine(scratch),
            deepspeed=version,
            parameters=saved.parameters,
            bytes=spec.nbytes,
            ranks=spec.ranks,
            to_ranks=spec.to_ranks,
            rounds=spec.rounds,
            results=lines,
            bars=compare(lines, spec.ranks, spec.to_ranks),
        )


def _convert(spec: DeepSpeedSpec, scratch: str, on_progress: OnProgress) -> tuple[str, list[Conversion]]:
    """Run DeepSpeed's conversion and our import, in turns; the tag of what the former has left, and all runs."""
    _, theirs = folders(scratch)
    source, universal, imported = (
        os.path.join(theirs, tag_of(spec.rounds)),
        os.path.join(theirs, "universal"),
        os.path.join(scratch, "imported"),
    )
    module = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    commands = {
        THEIRS: (universal, [*module, "--input_folder", source, "--output_folder", universal]),
        OURS: (imported, [sys.executable, "-m", "shardckpt", "import", "deepspeed", theirs, imported]),
    }
    runs = []
    for number in range(spec.rounds):
        for at, (who, (target, command)) in enumerate(commands.items()):
            on_progress(Progress(2 * number + at, 2 * spec.rounds, f"round {number + 1}: {who} converts"))
            shutil.rmtree(target, ignore_errors=True)
            os.sync()
            runs.append(_run(who, command, source, target))
    shutil.rmtree(imported)
    return os.path.basename(universal), runs


def _run(who: str, command: Sequence[str], source: str, target: str) -> Conversion:
    before = memory_now()
    begun = perf_counter()
    with MemoryWatch() as memory, _DiskWatch(target) as disk:
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        seconds = perf_counter() - begun
    if done.returncode:
        raise BenchmarkFailed(
            f"{' '.join(command)} ended with status {done.returncode}: {(done.stderr or done.stdout)[-2000:]}"
        )
    return Conversion(who, seconds, memory.peak - before, disk.peak / _bytes_under(source))


class _DiskWatch:
    """Looks every 50 ms, while the block runs, how many bytes lie in a folder."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="bench-disk", daemon=True)
        self.peak = 0
        """Most bytes at any look, and at the end."""

    def _look(self) -> None:
        while not self._over.wait(_PAUSE_SECONDS):
            self.peak = max(self.peak, _bytes_under(self._folder))

    def __enter__(self) -> _DiskWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.peak = max(self.peak, _bytes_under(self._folder))


def _bytes_under(folder: str) -> int:
    """Bytes of all files; those that go while it looks do not count."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(Path(place, name)).st_size
            except FileNotFoundError:
                continue
    return total
