# SPDX-License-Identifier: Apache-2.0
"""One rank: every error, short count and kill at every storage call of a save; and then the next save."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from shardckpt.errors import CheckpointError
from tests.engine.stores import files
from tests.faults.forks import DIED, LONGEST, run_worlds
from tests.faults.saves import (
    ALL,
    ERRORS,
    NEXT,
    Ended,
    Fault,
    attempt,
    check,
    copies,
    count_calls,
    faults,
    make_root,
    recover,
    save_next,
)
from tests.ranks import RankPool
from tests.store.faults import FaultyFileSystem

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * LONGEST)]

STEP_3 = "/step-00000003"
SPREAD = 37
"""Second faults are at this multiple of the first one's call, modulo the number of calls."""


def plan_faults(template: Path, kinds: Sequence[str], lasting_kinds: Sequence[str], wait: bool) -> list[Fault]:
    """Faults at each call of a save into a copy of ``template``, which is made here."""
    make_root(template)
    [root] = copies(template, 1)
    calls = count_calls(lambda fs: save_next(root, fs, wait=wait))
    assert check(root) == [2, 3]
    shutil.rmtree(root)
    return faults(calls, kinds) + faults(calls, lasting_kinds, lasting=True)


def save_with_errors(roots: Sequence[Path], planned: Sequence[Fault], wait: bool) -> list[Ended]:
    outcomes = []
    for root, fault in zip(roots, planned, strict=True):
        fs = fault.on(FaultyFileSystem())
        outcomes.append(attempt(fs, partial(save_next, root, fs, wait=wait)))
    return outcomes


def look(roots: Sequence[Path], planned: Sequence[Fault], outcomes: Sequence[Ended | str], before: Sequence[str]) -> None:
    """What must hold after each attempt, seen by another process; then the next save has to succeed."""
    for root, fault, outcome in zip(roots, planned, outcomes, strict=True):
        try:
            require_sound(root, fault, outcome, before)
            step = recover(root)
            assert check(root) == [step - 1, step]
        except (AssertionError, CheckpointError) as error:
            raise AssertionError(f"after {fault}, {outcome}: {error}") from error
        shutil.rmtree(root)


def require_sound(root: Path, fault: Fault, outcome: Ended | str, before: Sequence[str]) -> None:
    steps = check(root)
    assert steps in ([1, 2], [1, 2, 3], [2, 3])
    if isinstance(outcome, str):
        return
    assert not outcome.flushed_again
    if not outcome.error:
        assert NEXT in steps, "it was reported as saved"
        # of directories there is one flush more, by the prune when the step is durable already
        assert not outcome.struck.startswith(f"fsync {root}{STEP_3}/"), "a failed flush was passed over"
    elif not outcome.unknown:
        assert NEXT not in steps, "it was reported as not saved"
        assert outcome.error == ("StorageFull" if fault.kind in ("ENOSPC", "EDQUOT") else "StoreError")
        if not fault.lasting:
            assert files(root) == before, "the files of the attempt are left"


@pytest.mark.parametrize(
    ("wait", "kinds", "lasting"),
    [
        pytest.param(True, (*ERRORS, "short"), ERRORS, id="blocking"),
        pytest.param(False, ("EIO",), (), id="background"),
    ],
)
def test_every_error_at_every_call_of_a_save(
    ranks: RankPool, tmp_path: Path, wait: bool, kinds: Sequence[str], lasting: Sequence[str]
) -> None:
    template = tmp_path / "root"
    [planned] = ranks.run(1, plan_faults, template, kinds, lasting, wait)
    roots = copies(template, len(planned))
    [outcomes] = ranks.run(1, save_with_errors, roots, planned, wait, timeout=LONGEST)
    ranks.run(1, look, roots, planned, outcomes, files(template), timeout=LONGEST, fresh=True)
    calls = max(fault.call for fault in planned)
    assert calls > 80
    assert {fault.call for fault in planned} == set(range(1, calls + 1))
    assert len(planned) >= calls * (1 + len(lasting[:1]))
    assert all(outcome.struck for outcome in outcomes)
    failed = [outcome for outcome in outcomes if outcome.error]
    print(
        f"one rank, {'blocking' if wait else 'background'}: {len(planned)} faults at {calls} calls, {len(failed)} failed saves"
    )
    assert len(planned) / 4 < len(failed) < len(planned)
    assert 0 < len([outcome for outcome in failed if outcome.unknown]) < len(failed) / 3


def save_and_be_killed(roots: Sequence[Path], planned: Sequence[Fault], wait: bool) -> list[str]:
    def job(root: Path, fault: Fault) -> None:
        save_next(root, fault.on(FaultyFileSystem()), wait=wait)

    worlds = [[partial(job, root, fault)] for root, fault in zip(roots, planned, strict=True)]
    return [outcome for [outcome] in run_worlds(worlds)]


@pytest.mark.parametrize("wait", [True, False], ids=["blocking", "background"])
def test_a_kill_at_every_call_of_a_save(ranks: RankPool, tmp_path: Path, wait: bool) -> None:
    template = tmp_path / "root"
    [planned] = ranks.run(1, plan_faults, template, ("kill",), (), wait)
    roots = copies(template, len(planned))
    [outcomes] = ranks.run(1, save_and_be_killed, roots, planned, wait, timeout=LONGEST)
    assert outcomes == [DIED] * len(planned)
    ranks.run(1, look, roots, planned, outcomes, files(template), timeout=LONGEST, fresh=True)
    print(f"one rank, {'blocking' if wait else 'background'}: killed at each of {len(planned)} calls")
    assert len(planned) > 80


def recover_with_faults(roots: Sequence[Path], planned: Sequence[Fault]) -> int:
    """A second fault while a run is started again, in a process of its own; how many of them were killed by it."""

    def job(root: Path, fault: Fault) -> None:
        fs = fault.on(FaultyFileSystem())
        attempt(fs, partial(recover, root, fs))

    worlds = [[partial(job, root, fault)] for root, fault in zip(roots, planned, strict=True)]
    return [outcome for [outcome] in run_worlds(worlds)].count(DIED)


def look_again(roots: Sequence[Path]) -> None:
    """No step of which a process was told may be lost; and a third run goes on."""
    for root in roots:
        steps = check(root)
        assert 2 in steps or steps == [3, 4]
        step = recover(root)
        assert check(root) == [step - 1, step]


@pytest.mark.parametrize("kind", ["kill", "EIO"])
def test_a_second_fault_while_the_run_is_started_again(ranks: RankPool, tmp_path: Path, kind: str) -> None:
    template = tmp_path / "root"
    [kills] = ranks.run(1, plan_faults, template, ("kill",), (), True)
    planned = kills if ALL else kills[::2]
    roots = copies(template, len(planned))
    ranks.run(1, save_and_be_killed, roots, planned, True, timeout=LONGEST)
    second = [Fault(fault.call * SPREAD % len(kills) + 1, kind, lasting=kind != "kill") for fault in planned]
    [killed] = ranks.run(1, recover_with_faults, roots, second, timeout=LONGEST)
    ranks.run(1, look_again, roots, timeout=LONGEST, fresh=True)
    print(f"one rank: {len(planned)} kills, and then {kind} while the run was started again")
    assert len({fault.call for fault in second}) > 40
    assert killed == (len(planned) if kind == "kill" else 0)
