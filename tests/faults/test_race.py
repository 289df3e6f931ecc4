# SPDX-License-Identifier: Apache-2.0
"""Two runs save one step: one wins, whenever the other one commits, and nothing is mixed or overwritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardckpt.errors import AlreadyCommitted
from tests.engine.stores import checkpointer, content, files
from tests.faults.forks import LONGEST
from tests.faults.saves import ALL, NEXT, a_state, check, copies, make_root
from tests.store.faults import FaultyFileSystem

pytestmark = pytest.mark.timeout(2 * LONGEST)


def save(root: Path, fs: FaultyFileSystem, factor: int = 1) -> None:
    """Save one more step, with values that are ``factor`` times those of `a_state`."""
    state = a_state(NEXT)
    state["w"] *= factor
    with checkpointer(root, fs, workers=1) as ckpt:
        ckpt.save(NEXT, state, wait=True)


def save_against_a_rival(root: Path, call: int) -> bool:
    """Let another run commit the step before this call; whether this one was told so."""
    fs = FaultyFileSystem()
    committed: list[str] = []

    def rival(operation: Any, *args: Any) -> Any:
        save(root, FaultyFileSystem())
        committed.append(content(root, NEXT))
        return operation(*args)

    try:
        save(root, fs.strike(call, rival), factor=5)
        told = False
    except AlreadyCommitted:
        told = True
    assert committed == [content(root, NEXT)], f"overwritten by {fs.struck}"
    return told


def test_a_rival_at_calls_up_to_the_commit(tmp_path: Path) -> None:
    template = make_root(tmp_path / "root")
    [counted] = copies(template, 1)
    fs = FaultyFileSystem()
    save(counted, fs)
    commit = next(n for n, (name, args) in enumerate(fs.calls, 1) if name == "link" and args[1].endswith("/manifest.json"))
    assert commit > 40
    calls = sorted({*range(1, commit + 1, 1 if ALL else 5), commit})
    for call, root in zip(calls, copies(template.rename(tmp_path / "other"), len(calls)), strict=True):
        assert save_against_a_rival(root, call), call
        assert check(root) == [1, 2, NEXT]
        assert len(files(root)) == 6, f"files of the one that lost are left at call {call}"
    print(f"two runs: {len(calls)} calls at which the rival wins")
