# SPDX-License-Identifier: Apache-2.0
"""Every call of the storage interface fails in turn, before it has done its work and after: replies get lost."""

from __future__ import annotations

import os
import shutil
from itertools import product
from pathlib import Path

import pytest

import shardckpt
from shardckpt.errors import AlreadyExists, StoreError
from shardckpt.options import Options
from shardckpt.store import LocalStore, Store
from tests.engine.stores import files
from tests.faults.forks import LONGEST, PATIENCE
from tests.faults.saves import KEPT, NEXT, a_state, check, copies, make_root, recover
from tests.faults.stores import FaultyStore
from tests.store.faults import FaultyFileSystem

pytestmark = pytest.mark.timeout(2 * LONGEST)

MANIFEST = "step-00000003/manifest.json"


def local(root: Path) -> LocalStore:
    return LocalStore(root, FaultyFileSystem())


def on(store: FaultyStore) -> shardckpt.Checkpointer:
    class Injected(shardckpt.Checkpointer):
        @staticmethod
        def _open_store(url: str | os.PathLike[str]) -> Store:
            return store

    return Injected(store.url, keep_last=len(KEPT), options=Options(workers=1, on_error="raise"))


def save_next(store: FaultyStore, wait: bool) -> StoreError | None:
    """Save one more step; the error, if it failed."""
    try:
        with on(store) as ckpt:
            ckpt.save(NEXT, a_state(NEXT), wait=wait).result(PATIENCE)
    except StoreError as error:
        return error
    return None


@pytest.mark.slow
@pytest.mark.parametrize("wait", [True, False], ids=["blocking", "background"])
def test_a_save_of_which_a_call_fails(tmp_path: Path, wait: bool) -> None:
    template = make_root(tmp_path / "root")
    [root] = copies(template, 1)
    counted = FaultyStore(local(root))
    assert save_next(counted, wait) is None
    calls, before = counted.calls, files(template)
    assert len(calls) > 15
    shutil.rmtree(root)
    failed = []
    for root, (number, done) in zip(copies(template, 2 * len(calls)), product(range(len(calls)), (False, True)), strict=True):
        error = save_next(FaultyStore(local(root), number + 1, done=done), wait)
        where = f"{calls[number]}, {done=}: {error}"
        steps = check(root)
        assert steps in ([1, 2], [1, 2, 3], [2, 3]), where
        if error is None:
            assert NEXT in steps, where
        elif error.details.get("outcome") == "unknown":
            assert steps == [1, 2, 3] and calls[number] == f"put {MANIFEST}" and done, where
        else:
            assert NEXT not in steps and files(root) == before, where
        failed.append(error is not None)
        step = recover(root)
        assert check(root) == [step - 1, step], where
    print(f"{'blocking' if wait else 'background'}: {2 * len(calls)} faults at {len(calls)} calls of the store")
    assert len(calls) / 2 < sum(failed) < 2 * len(calls)


def test_a_commit_that_finds_itself(tmp_path: Path) -> None:
    """A store that repeats a request whose reply was lost may find its own manifest there."""
    template = make_root(tmp_path / "root")
    first, root = copies(template, 2)
    counted = FaultyStore(local(first))
    assert save_next(counted, wait=True) is None
    number = counted.calls.index(f"put {MANIFEST}") + 1
    assert save_next(FaultyStore(local(root), number, done=True, error=AlreadyExists), wait=True) is None
    assert check(root) == [2, 3]


def test_a_restore_of_which_a_call_fails(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root")
    counted = FaultyStore(local(root))
    with on(counted) as ckpt:
        ckpt.restore(a_state(0))
    reads = [number for number, call in enumerate(counted.calls, 1) if "/.restores" not in call and ".restores" not in call]
    assert len(reads) > 4
    for number in reads:
        for done in (False, True):
            store = FaultyStore(local(root), number, done=done)
            target = a_state(0)
            with on(store) as ckpt:
                with pytest.raises(StoreError, match="injected"):
                    ckpt.restore(target)
                assert ckpt.restore(target) is not None
            assert target["w"].equal(a_state(KEPT[-1])["w"])
