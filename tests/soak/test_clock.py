# SPDX-License-Identifier: Apache-2.0
"""A wall clock that jumps: steps are in the order of their numbers, deadlines are measured by a clock that does not jump."""

from __future__ import annotations

import ast
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
import torch

import shardckpt
from shardckpt.journal import Journal
from shardckpt.store import LocalStore
from tests.style.source import ROOT, modules

FUTURE, PAST = 4_000_000_000.0, 1.0

WALL_CLOCKS: Final = {"time.time", "time.time_ns", "time.localtime", "time.gmtime", "time.ctime", "time.strftime"}
WALL_CLOCK_METHODS: Final = {"now", "utcnow", "today", "fromtimestamp"}
MAY_LOOK: Final = {
    "shardckpt.commit": "writes `created` into the manifest, which only people read",
    "shardckpt.journal": "sweeps markers of saves, which only people read",
    "shardckpt.maintain.listing": "tells for how long a save was silent",
    "shardckpt.cli.output": "prints ages",
    "shardckpt.store.memory": "stands for the clock of a storage, which is a `Store`'s own",
}
"""Who may look at the clock on the wall, and why nothing that is promised depends on it."""


def looks(tree: ast.Module) -> list[int]:
    """Lines with an expression that reads, or stands for, the clock on the wall."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (ast.unparse(node) in WALL_CLOCKS or is_of_datetime(node)):
            found.append(node.lineno)
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            found += [node.lineno for alias in node.names if f"time.{alias.name}" in WALL_CLOCKS]
    return found


def is_of_datetime(node: ast.Attribute) -> bool:
    return node.attr in WALL_CLOCK_METHODS and ast.unparse(node.value).split(".")[-1] in ("datetime", "date")


def test_nobody_looks_at_the_wall_clock_for_more_than_people_read() -> None:
    judged = [module for module in modules("shardckpt") if not module.name.startswith("shardckpt.bench")]
    found = {module.name for module in judged if looks(module.tree)}
    assert found - set(MAY_LOOK) == set()


@pytest.mark.parametrize("text", ["time.time()", "from time import time", "datetime.datetime.now()", "f(clock=time.time)"])
def test_such_a_look_is_seen(text: str) -> None:
    assert looks(ast.parse(text))
    assert not looks(ast.parse("from time import monotonic\nt = time.monotonic() - time.perf_counter() + self.time"))


# ---- the storage's clock


def set_times(directory: Path, seconds: float) -> None:
    for path in [*directory.iterdir(), directory]:
        os.utime(path, (seconds, seconds))


def test_the_newest_step_is_the_one_with_the_largest_number(tmp_path: Path) -> None:
    """Whatever the storage says of their times; and the oldest go first."""
    with shardckpt.Checkpointer(tmp_path) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, {"t": torch.full((3,), float(step))}, wait=True)
    for step, seconds in ((1, FUTURE), (2, PAST), (3, PAST - 1)):
        set_times(tmp_path / f"step-{step:08}", seconds)
    target = {"t": torch.zeros(3)}
    with shardckpt.Checkpointer(tmp_path, keep_last=2) as ckpt:
        restored = ckpt.restore(target)
        assert restored is not None
        assert (restored.step, target["t"].tolist()) == (3, [3.0] * 3)
        ckpt.save(4, {"t": torch.full((3,), 4.0)}, wait=True)
        assert ckpt.steps() == [3, 4]


def test_a_journal_whose_clock_jumps_marks_and_sweeps(tmp_path: Path) -> None:
    times = itertools.cycle([FUTURE, PAST])
    journal = Journal(LocalStore(tmp_path), clock=lambda: next(times))
    for step in (1, 2, 3):
        journal.requested(step, f"{step:016x}")
        journal.staged(step, f"{step:016x}")
        assert [entry.state for entry in journal.entries()] == ["staged"]
        journal.durable(step, f"{step:016x}")
        assert journal.entries() == []


# ---- the clock of this machine, as a process sees it

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <sys/time.h>
#include <time.h>

/* Every look at the wall clock is ten years before or after the last one. */
static atomic_int looks;
static long jump(void) { return (atomic_fetch_add(&looks, 1) % 2 ? -5L : 5L) * 365 * 24 * 3600; }

int clock_gettime(clockid_t which, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(which, at);
    if (!status && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) at->tv_sec += jump();
    return status;
}

time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    (void)zone;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""

JOB = """
import sys, time
sys.path.insert(0, {source!r})
import torch, shardckpt
looks = [time.time() for _ in range(4)]
assert max(looks) - min(looks) > 1e8, looks
for background, stage in (("thread", "eager"), ("thread", "lazy"), ("process", "eager")):
    options = shardckpt.Options(background=background, stage=stage, timeout=120.0)
    with shardckpt.Checkpointer({root!r}, keep_last=2, every_seconds=1e-6, options=options) as ckpt:
        target = {{"t": torch.zeros(3)}}
        restored = ckpt.restore(target)
        last = restored.step if restored else 0
        assert target["t"].tolist() == [float(last)] * 3, target
        for step in (last + 1, last + 2, last + 3):
            # due one microsecond after the last one began
            while not ckpt.should_save(step):
                pass
            ckpt.save(step, {{"t": torch.full((3,), float(step))}}).result(120)
        assert ckpt.steps() == [last + 2, last + 3], ckpt.steps()
print("steps", ckpt.steps())
"""


@pytest.fixture
def jumping_clock(tmp_path: Path) -> Path:
    """A library that makes the wall clock jump in the process that it is loaded into."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler here to make the clock jump with")
    source, library = tmp_path / "clock.c", tmp_path / "clock.so"
    source.write_text(SHIM)
    done = subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the C compiler makes no library here: {done.stderr[-500:]}")
    return library


@pytest.mark.slow
def test_saves_and_restores_while_the_clock_jumps_by_ten_years(tmp_path: Path, jumping_clock: Path) -> None:
    """At each look, in the process that trains and in the one that saves."""
    script = tmp_path / "train.py"
    script.write_text(JOB.format(source=str(ROOT), root=str(tmp_path / "run")))
    environment = {**os.environ, "LD_PRELOAD": str(jumping_clock)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=250)
    assert done.stdout.endswith("steps [8, 9]\n"), done.stdout + done.stderr
    assert shardckpt.load(tmp_path / "run").state["t"].tolist() == [9.0] * 3
