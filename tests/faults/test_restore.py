# SPDX-License-Identifier: Apache-2.0
"""One rank: every error, short count and kill at every storage call of a restore: exact or an error, and nothing changes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.faults.forks import DIED, LONGEST, run_worlds
from tests.faults.saves import ERRORS, KEPT, attempt, count_calls, faults, make_root, restore_newest
from tests.ranks import RankPool
from tests.store.faults import FaultyFileSystem

pytestmark = pytest.mark.timeout(2 * LONGEST)


def restore_with_faults(root: Path) -> tuple[int, int, int]:
    """Restore with a fault at each call; how many calls, faults, and restores that failed."""
    make_root(root)
    found = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    calls = count_calls(partial(restore_newest, root))
    planned = faults(calls, (*ERRORS, "short")) + faults(calls, ERRORS, lasting=True)
    failed = 0
    for fault in planned:
        fs = fault.on(FaultyFileSystem())
        outcome = attempt(fs, partial(restore_newest, root, fs))
        assert outcome.struck
        # a hint, and what is remembered of restores that failed
        optional = outcome.struck.startswith("expect_ascending ") or "/.restores" in outcome.struck
        harmless = fault.kind == "short" or optional
        assert outcome.error or harmless, outcome
        assert not outcome.error or fault.lasting or not harmless, outcome
        failed += bool(outcome.error)
        assert restore_newest(root, FaultyFileSystem()) == KEPT[-1]
    killed = [[partial(restore_newest, root, fault.on(FaultyFileSystem()))] for fault in faults(calls, ("kill",))]
    assert run_worlds(killed) == [[DIED]] * len(calls)
    assert restore_newest(root, FaultyFileSystem()) == KEPT[-1]
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == found
    return len(calls), len(planned) + len(killed), failed


def test_faults_at_every_call_of_a_restore(ranks: RankPool, tmp_path: Path) -> None:
    [(calls, planned, failed)] = ranks.run(1, restore_with_faults, tmp_path / "root", timeout=LONGEST)
    print(f"restore: {planned} faults at {calls} calls; {failed} restores failed, all others were exact")
    assert calls > 15
    assert planned > 3 * calls
    assert failed > calls
