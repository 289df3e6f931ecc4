# SPDX-License-Identifier: Apache-2.0
"""Every error and kill at every storage call of a prune; a second one when it is tried again; and then one that succeeds."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest

from shardckpt.options import Retention
from shardckpt.pruning import Pruner
from shardckpt.root import Root
from shardckpt.store import LocalStore
from tests.faults.forks import LONGEST, run_worlds
from tests.faults.saves import ALL, ERRORS, Fault, attempt, check, copies, count_calls, faults, make_root, recover
from tests.ranks import RankPool
from tests.store.faults import FaultyFileSystem

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * LONGEST)]

OTHER = 37
"""Second faults are at this multiple of the first one's call, modulo the number of calls."""


def prune(root: Path, fs: FaultyFileSystem) -> None:
    store = LocalStore(root, fs)
    for removal in Pruner(store).plan(Root(store).look(), Retention(keep_last=1)):
        Pruner(store).remove(removal)


def prune_with_fault(root: Path, fault: Fault) -> None:
    fs = fault.on(FaultyFileSystem())
    outcome = attempt(fs, partial(prune, root, fs))
    steps = check(root)
    assert steps in ([1, 2], [2]), (fault, outcome)
    assert steps == [2] or outcome.error, "it was reported as done"


def prune_with_faults(template: Path) -> tuple[int, int]:
    """A fault at each call; how many calls, and how many faults."""
    make_root(template)
    [root] = copies(template, 1)
    calls = count_calls(partial(prune, root))
    assert check(root) == [2]
    shutil.rmtree(root)
    once, lasting = faults(calls, ERRORS), faults(calls, ERRORS, lasting=True)
    planned = once + lasting if ALL else once[::2] + lasting[1::2]
    kills = faults(calls, ("kill",))
    roots = copies(template, len(planned) + len(kills))
    for factor in (1, OTHER):
        again = [Fault(f.call * factor % len(calls) + 1, f.kind, f.lasting) for f in (*planned, *kills)]
        for root, fault in zip(roots, again[: len(planned)], strict=False):
            prune_with_fault(root, fault)
        worlds = zip(roots[len(planned) :], again[len(planned) :], strict=True)
        run_worlds([[partial(prune_with_fault, root, fault)] for root, fault in worlds])
    for root in roots:
        prune(root, FaultyFileSystem())
        recover(root)
        assert check(root) == [2, 3]
    return len(calls), len(planned) + len(kills)


def test_faults_at_every_call_of_a_prune(ranks: RankPool, tmp_path: Path) -> None:
    [(calls, planned)] = ranks.run(1, prune_with_faults, tmp_path / "root", timeout=LONGEST)
    print(f"prune: {planned} faults at {calls} calls, and as many second ones")
    assert calls > 20
    assert planned >= 2 * calls
