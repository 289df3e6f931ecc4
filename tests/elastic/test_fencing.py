# SPDX-License-Identifier: Apache-2.0
"""Fences: a start of a run keeps what earlier starts have left behind from committing, at every moment of a save."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

import shardckpt
from shardckpt import AlreadyCommitted, BackgroundDied, Options, StoreError, Superseded
from shardckpt.background.process import settle
from shardckpt.fencing import Fence, Fencing, raise_fence, require_current
from shardckpt.finish import Job
from shardckpt.store import LocalStore, MemoryStore, Store
from tests.engine.stores import Gate, a_state, equal, files, loaded
from tests.engine.waiting import InThread

PATIENCE = 120.0


class PublishGate(LocalStore):
    """A store that cannot revoke, as in buckets, in which no manifest can be published while the gate is closed."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        super().__init__(root)
        self.gate = threading.Event()
        self.reached = threading.Event()

    def put_if_allowed(self, name: str, data: bytes, allow: Callable[[], None]) -> None:
        allow()
        self.reached.set()
        if not self.gate.wait(PATIENCE):
            raise TimeoutError("nobody opened the gate")
        super().put_if_absent(name, data)

    def revoke(self, name: str) -> None:
        pass


def a_start(
    root: Path, run: str | None = "job", *, open_store: Callable[[Any], Store] = LocalStore, **options: Any
) -> shardckpt.Checkpointer:
    """A checkpointer as a process of a run makes it; each stands for a process of its own."""

    class Start(shardckpt.Checkpointer):
        _open_store = staticmethod(open_store)  # type: ignore[assignment]
        _run_name = staticmethod(lambda: run)  # type: ignore[assignment]
        _fences: ClassVar[dict[tuple[str, str], Fence]] = {}

    return Start(root, options=Options(timeout=PATIENCE, **options))


def marks(root: Path) -> list[str]:
    """The generations whose marks are there."""
    return sorted(path.name.split("-")[1] for path in (root / ".fences").iterdir())


def attempts(root: Path, step: int) -> set[str]:
    """Of the rank files of a step."""
    return {path.stem.split("-")[2] for path in (root / f"step-{step:08}").glob("rank-*")}


def test_generations_count_the_starts_of_a_run(tmp_path: Path) -> None:
    with a_start(tmp_path) as first:
        assert first.restore(a_state(0)) is None
        assert marks(tmp_path) == ["00000001"]
        first.save(1, a_state(1), wait=True)
        first.save(2, a_state(2)).result(PATIENCE)
        assert marks(tmp_path) == ["00000001"]
        with type(first)(tmp_path) as again:
            assert again.restore(a_state(0)) is not None
        assert marks(tmp_path) == ["00000001"]
    with a_start(tmp_path) as second:
        second.save(3, a_state(3), wait=True)
        assert marks(tmp_path) == ["00000002"]
    stamps = [attempt[:16] for step in (1, 2, 3) for attempt in attempts(tmp_path, step)]
    run = stamps[0][:8]
    assert stamps == [f"{run}00000001", f"{run}00000001", f"{run}00000002"]


def test_a_run_without_a_name_leaves_no_mark(tmp_path: Path) -> None:
    with a_start(tmp_path, None) as ckpt:
        ckpt.restore(a_state(0))
        ckpt.save(1, a_state(1), wait=True)
    assert not (tmp_path / ".fences").exists()
    assert {len(attempt) for attempt in attempts(tmp_path, 1)} == {16}


@pytest.mark.parametrize("wait", [False, True])
def test_a_save_that_was_under_way_is_not_committed(tmp_path: Path, wait: bool) -> None:
    """The old start writes its files when the new one begins."""
    disk = Gate()
    old = a_start(tmp_path, open_store=lambda url: LocalStore(url, disk))
    assert old.restore(a_state(0)) is None
    old.save(90, a_state(90), wait=True)
    disk.lower()
    saving = InThread(lambda: old.save(100, a_state(-100), wait=wait).result(PATIENCE))
    disk.until_reached()
    with a_start(tmp_path) as new:
        restored = new.restore(a_state(0))
        assert restored is not None
        assert restored.step == 90
        disk.lift()
        error = saving.error()
        assert isinstance(error, Superseded)
        assert "this process is of start 1 of its run, and start 2 has begun" in str(error)
        assert new.steps() == [90]
        assert not [name for name in files(tmp_path) if "step-00000100" in name]
        new.save(100, a_state(100)).result(PATIENCE)
    assert equal(loaded(tmp_path, 100)["t"], a_state(100)["t"])
    assert len(attempts(tmp_path, 100)) == 1
    with pytest.raises(Superseded):
        old.save(110, a_state(-110), wait=True)
    old.close()
    with a_start(tmp_path) as last:
        assert last.steps() == [90, 100]


def test_a_trainer_that_was_left_behind_is_ended(tmp_path: Path) -> None:
    """It does not go on for good with saves that fail, although the options only warn of saves that do."""
    old = a_start(tmp_path, on_error="warn")
    old.save(1, a_state(1), wait=True)
    with a_start(tmp_path) as new:
        new.restore(a_state(0))
    old.save(2, a_state(2))
    with pytest.raises(Superseded):
        old.save(3, a_state(3))
    old.close()


def test_a_commit_that_was_past_its_look_gives_way_to_the_new_start(tmp_path: Path) -> None:
    """The new start begins between the look and the publication; the old one is not told that it has saved."""
    store = PublishGate(tmp_path)
    old = a_start(tmp_path, open_store=lambda url: store)
    handle = old.save(100, a_state(-100))
    assert store.reached.wait(PATIENCE)
    with a_start(tmp_path) as new:
        assert new.restore(a_state(0)) is None
        store.gate.set()
        with pytest.raises(Superseded) as caught:
            handle.result(PATIENCE)
        assert caught.value.outcome == "unknown"
        assert new.steps() == [100]
        (before,) = attempts(tmp_path, 100)
        new.save(100, a_state(100)).result(PATIENCE)
        assert equal(loaded(tmp_path, 100)["t"], a_state(100)["t"])
        (after,) = attempts(tmp_path, 100)
        assert before[:16] != after[:16]
        with pytest.raises(AlreadyCommitted):
            new.save(100, a_state(7), wait=True)
    old.close()


def test_the_new_start_wins_also_when_both_publish_at_once(tmp_path: Path) -> None:
    slow, other = PublishGate(tmp_path), PublishGate(tmp_path)
    old = a_start(tmp_path, open_store=lambda url: slow)
    late = old.save(100, a_state(-100))
    assert slow.reached.wait(PATIENCE)
    new = a_start(tmp_path, open_store=lambda url: other)
    assert new.restore(a_state(0)) is None
    handle = new.save(100, a_state(100))
    assert other.reached.wait(PATIENCE)
    slow.gate.set()
    with pytest.raises(Superseded):
        late.result(PATIENCE)
    assert new.steps() == [100]
    other.gate.set()
    assert handle.result(PATIENCE).step == 100
    assert equal(loaded(tmp_path, 100)["t"], a_state(100)["t"])
    assert len(attempts(tmp_path, 100)) == 1
    new.close()
    old.close()


def test_what_the_new_start_has_resumed_from_does_not_give_way(tmp_path: Path) -> None:
    """It was published between the mark of the new start and its look for the newest step."""
    store = PublishGate(tmp_path)
    old = a_start(tmp_path, open_store=lambda url: store)
    handle = old.save(100, a_state(100))
    assert store.reached.wait(PATIENCE)
    new = a_start(tmp_path)
    assert new._fencing.ensure() is not None
    store.gate.set()
    with pytest.raises(Superseded):
        handle.result(PATIENCE)
    restored = new.restore(a_state(0))
    assert restored is not None
    assert restored.step == 100
    with pytest.raises(AlreadyCommitted):
        new.save(100, a_state(7), wait=True)
    assert equal(loaded(tmp_path, 100)["t"], a_state(100)["t"])
    new.close()
    old.close()


def test_what_was_committed_before_the_new_start_stays(tmp_path: Path) -> None:
    with a_start(tmp_path) as old:
        for step in (1, 2, 3):
            old.save(step, a_state(step), wait=True)
    with a_start(tmp_path) as new:
        restored = new.restore(a_state(0), step=1)
        assert restored is not None
        for step in (2, 3):
            with pytest.raises(AlreadyCommitted):
                new.save(step, a_state(7), wait=True)
    assert [equal(loaded(tmp_path, step)["t"], a_state(step)["t"]) for step in (1, 2, 3)] == [True] * 3


@pytest.mark.parametrize("other", ["another", None])
def test_runs_of_other_names_are_let_alone(tmp_path: Path, other: str | None) -> None:
    one, two = a_start(tmp_path), a_start(tmp_path, other)
    one.save(1, a_state(1), wait=True)
    two.save(2, a_state(2), wait=True)
    one.save(3, a_state(3), wait=True)
    with pytest.raises(AlreadyCommitted):
        two.save(3, a_state(7), wait=True)
    two.save(4, a_state(4), wait=True)
    with pytest.raises(AlreadyCommitted):
        one.save(4, a_state(7), wait=True)
    assert one.steps() == [1, 2, 3, 4]
    one.close()
    two.close()


class NoMarks(LocalStore):
    """A store that refuses marks."""

    def put_if_absent(self, name: str, data: bytes) -> None:
        if name.startswith(".fences/"):
            raise StoreError("the mark is refused")
        super().put_if_absent(name, data)


def test_storage_that_refuses_the_mark_does_not_stop_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with a_start(tmp_path, open_store=NoMarks) as ckpt, caplog.at_level(logging.WARNING, "shardckpt"):
        assert ckpt.restore(a_state(0)) is None
        ckpt.save(1, a_state(1), wait=True)
        assert ckpt.steps() == [1]
    assert "earlier starts of run 'job' cannot be kept from saving: the mark is refused" in caplog.text


def test_a_commit_that_nobody_told_of_counts_only_without_a_newer_start(tmp_path: Path) -> None:
    with a_start(tmp_path) as ckpt:
        saved = ckpt.save(7, a_state(7), wait=True).result()
        fence = ckpt._saver.fence
    assert fence is not None
    (attempt,) = attempts(tmp_path, 7)
    died, store = BackgroundDied("it was killed", rank=0), LocalStore(tmp_path)
    job = Job(prefix="step-00000007/", step=7, attempt=attempt, header=b"", block_size=1, draft=None, fence=fence)
    assert settle(store, job, died) == saved.digest
    raise_fence(store, "job")
    with pytest.raises(Superseded) as caught:
        settle(store, job, died)
    assert caught.value.outcome == "unknown"


class Blind(MemoryStore):
    """A store that cannot list."""

    def list(self, prefix: str = "") -> Any:
        raise StoreError("cannot list")


def test_a_look_that_fails_after_the_publication_leaves_the_outcome_open() -> None:
    fence = raise_fence(MemoryStore("blind"), "job")
    with pytest.raises(StoreError) as before:
        require_current(Blind("blind"), fence, 1, published=False)
    assert "outcome" not in before.value.details
    with pytest.raises(StoreError) as after:
        require_current(Blind("blind"), fence, 1, published=True)
    assert after.value.outcome == "unknown"


def test_marks_of_strangers_are_let_alone() -> None:
    store = MemoryStore("strange")
    for name in ("README", "00000000-00000009", "00000000-0000009", "x"):
        store.put_if_absent(f".fences/{name}", b"")
    assert raise_fence(store, "job").generation == 1
    assert raise_fence(store, "job").generation == 2
    assert len(store.list(".fences")) == 5


def test_a_mark_that_no_other_can_follow_is_named() -> None:
    store = MemoryStore("last")
    run = raise_fence(store, "job").run
    store.put_if_absent(f".fences/{run}-ffffffff", b"")
    with pytest.raises(StoreError, match="the last start that can be counted: remove it"):
        raise_fence(store, "job")


@pytest.mark.parametrize(
    ("attempt", "step", "expected"),
    [
        ("aaaaaaaa" "00000002" "0123456789abcdef", 8, True),
        ("aaaaaaaa" "00000002" "0123456789abcdef", 7, False),
        ("aaaaaaaa" "00000003" "0123456789abcdef", 8, False),
        ("aaaaaaaa" "00000004" "0123456789abcdef", 8, False),
        ("bbbbbbbb" "00000002" "0123456789abcdef", 8, False),
        ("aaaaaaaa" "00000002", 8, False),
    ],
)  # fmt: skip
def test_what_gives_way(attempt: str, step: int, expected: bool) -> None:
    assert Fence(run="aaaaaaaa", generation=3, newest=7).outdates(step, attempt) is expected


def test_fencing_without_a_name_talks_to_nobody() -> None:
    fencing = Fencing(None, MemoryStore("none"), None, {})  # type: ignore[arg-type]
    assert fencing.ensure() is None
    fencing.resumed(1)
