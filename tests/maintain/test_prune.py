# SPDX-License-Identifier: Apache-2.0
"""Prune: what is dead by the clock of the storage goes, and nothing else, whatever clocks do and whoever is killed."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shardckpt
from shardckpt.errors import MissingFile
from shardckpt.failed_restores import FailedRestores
from shardckpt.failure import Failure
from shardckpt.journal import Journal
from shardckpt.layout import Mesh, MeshLayout, Replicate
from shardckpt.manifest import MANIFEST_NAME, manifest_digest, rank_file_name, step_directory
from shardckpt.options import GRACE_SECONDS, Options, Retention
from shardckpt.pruning import Pruner, Removal, RunPruner, storage_time
from shardckpt.root import Root, removal_mark
from shardckpt.store import LocalStore, MemoryStore, Store
from tests.engine.simulate import by_hand, invented_receipts, manifest_of
from tests.store.faults import FaultyFileSystem
from tests.store.helpers import names

A, B, C = "a" * 16, "b" * 16, "c" * 16
NOW = 1e9
HOUR = 3600.0

_numbers = itertools.count()


class Clock:
    """Time that only a test moves, in seconds."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def on_memory() -> tuple[Clock, MemoryStore]:
    clock = Clock()
    return clock, MemoryStore(f"prune-{next(_numbers)}", clock)


def put(store: Store, step: int, attempt: str, *ranks: int) -> list[str]:
    """Files of some ranks; their names."""
    made = [f"{step_directory(step)}/{rank_file_name(rank, attempt)}" for rank in ranks or (0,)]
    for name in made:
        store.put_if_absent(name, b"x" * 10)
    return made


def commit(store: Store, step: int, attempt: str, manifests: dict[str, bytes]) -> str:
    """A manifest that names the attempt; a real one, as only such a one is believed."""
    name = f"{step_directory(step)}/{MANIFEST_NAME}"
    store.put_if_absent(name, manifests[attempt])
    return name


@pytest.fixture(scope="session")
def manifests() -> dict[str, bytes]:
    """Valid manifests by the attempt that they name."""
    plan = by_hand(1, {"t": ("float32", MeshLayout((2,), Mesh((0,), (1,)), (Replicate(),)), (0, 1))})
    return {attempt: manifest_of(plan, invented_receipts(plan, attempt), attempt) for attempt in (A, B, C)}


def prune(store: Store, keep_last: int | None = None, dead_before: float | None = None) -> list[Removal]:
    """Plan, and carry the plan out."""
    pruner = Pruner(store)
    plan = pruner.plan(
        Root(store).look(),
        Retention(keep_last=keep_last),
        dead_before=dead_before,
        directories=store.empty_directories(),
    )
    assert all(pruner.remove(removal) for removal in plan)
    return plan


# ---- what is dead


def test_an_attempt_is_dead_when_none_of_its_files_was_written_for_the_grace_time() -> None:
    clock, store = on_memory()
    dead = put(store, 5, A, 0, 1)
    put(store, 5, B, 0)
    put(store, 6, C, 0)
    clock.now += HOUR
    alive = [*put(store, 5, B, 1), *put(store, 6, C, 7)]
    assert prune(store, dead_before=NOW) == []
    (removal,) = prune(store, dead_before=NOW + 1)
    assert (removal.what, removal.step, removal.attempt, removal.nbytes) == ("attempt", 5, A, 20)
    assert list(removal.names) == dead
    assert set(alive) < set(names(store))
    assert len(names(store)) == 4


@pytest.mark.parametrize("state", ["requested", "staged"])
def test_a_fresh_marker_keeps_an_attempt_alive(state: str) -> None:
    clock, store = on_memory()
    put(store, 5, A)
    put(store, 6, B)
    clock.now += HOUR
    journal = Journal(store, clock)
    getattr(journal, state)(5, A)
    journal.failed(6, B, shardckpt.StoreError("no"))
    (removal,) = prune(store, dead_before=NOW + 1)
    assert removal.attempt == B
    clock.now += HOUR
    (removal,) = prune(store, dead_before=NOW + HOUR + 1)
    assert removal.attempt == A


def test_dead_attempts_at_a_committed_step_go_and_the_committed_one_stays(manifests: dict[str, bytes]) -> None:
    clock, store = on_memory()
    put(store, 5, A, 0, 1)
    kept = [*put(store, 5, B), commit(store, 5, B, manifests)]
    clock.now += HOUR
    put(store, 5, C)
    (removal,) = prune(store, dead_before=NOW + 1)
    assert (removal.what, removal.attempt, len(removal.entries)) == ("attempt", A, 2)
    assert names(store) == sorted([*kept, f"{step_directory(5)}/{rank_file_name(0, C)}"])
    prune(store, dead_before=NOW + 2 * HOUR)
    assert names(store) == sorted(kept)


def test_nothing_goes_where_the_manifest_does_not_tell_which_attempt_it_is_of() -> None:
    _, store = on_memory()
    put(store, 5, A)
    put(store, 5, B)
    store.put_if_absent(f"{step_directory(5)}/{MANIFEST_NAME}", b'{"attempt":"aaaaaaaaaaaaaaaa"}')
    assert prune(store, dead_before=NOW + HOUR) == []


def test_an_expired_step_takes_no_files_of_a_save_with_it(manifests: dict[str, bytes]) -> None:
    clock, store = on_memory()
    put(store, 5, A)
    commit(store, 5, A, manifests)
    under_way = put(store, 5, B)
    newest = [*put(store, 6, C), commit(store, 6, C, manifests)]
    (removal,) = prune(store, keep_last=1, dead_before=NOW - 1)
    assert (removal.what, removal.step, removal.attempt) == ("step", 5, A)
    assert names(store) == sorted([*under_way, *newest])
    clock.now += HOUR


def test_temporary_files_and_empty_directories_go(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    put(store, 5, A)
    old = [
        *(tmp_path / step_directory(5) / name for name in ("manifest.json.0123abcd.tmp", "manifest.json.claim.tmp")),
        *(tmp_path / name for name in ("probe.0123abcd.tmp", ".clock/0123.tmp", ".fences/0-1.claim.tmp")),
        *(tmp_path / name for name in (".saves", "step-00000006", "step-00000007")),
    ]
    others = [tmp_path / name for name in ("notes.tmp", ".git", "logs", "step-8", "step-00000009")]
    for path in [*old, *others]:
        if path.suffix == ".tmp":
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"1234")
        else:
            path.mkdir()
    now = storage_time(store)
    assert now is not None
    for path in [*old, *others[:-1], tmp_path / ".clock", tmp_path / ".fences"]:
        os.utime(path, (now - HOUR, now - HOUR))
    plan = prune(store, dead_before=now - HOUR / 2)
    assert [(removal.what, removal.step) for removal in plan] == [
        ("temporary", 5),
        ("temporary", None),
        ("directory", None),
        ("directory", 6),
        ("directory", 7),
    ]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in others} | {step_directory(5)}
    assert len(names(store)) == 2


def test_an_empty_directory_that_is_filled_meanwhile_stays(tmp_path: Path, manifests: dict[str, bytes]) -> None:
    store, pruner = LocalStore(tmp_path), Pruner(LocalStore(tmp_path))
    (tmp_path / step_directory(5)).mkdir()
    (removal,) = pruner.plan(Root(store).look(), dead_before=float("inf"), directories=store.empty_directories())
    kept = [*put(store, 5, A), commit(store, 5, A, manifests)]
    assert pruner.remove(removal)
    assert names(store) == sorted(kept)


@given(st.data())
def test_what_is_known_to_be_damaged_makes_no_other_step_go(manifests: dict[str, bytes], data: st.DataObject) -> None:
    steps = data.draw(st.lists(st.integers(0, 12), min_size=1, unique=True).map(sorted))
    damaged = data.draw(st.sets(st.sampled_from(steps)))
    retention = Retention(keep_last=data.draw(st.integers(1, 4)), keep_every=data.draw(st.none() | st.integers(1, 5)))
    _, store = on_memory()
    for step in steps:
        put(store, step, A)
        commit(store, step, A, manifests)
    for step in damaged:
        FailedRestores(store).remember(step, manifest_digest(manifests[A]), Failure("ChecksumMismatch", "no", {}))
    FailedRestores(store).remember(steps[0], "0" * 64, Failure("ChecksumMismatch", "of a manifest that is gone", {}))
    going = {removal.step for removal in Pruner(store).plan(Root(store).look(), retention)}
    intact = [step for step in steps if step not in damaged]
    assert retention.keep_last is not None
    assert going.isdisjoint(intact[-retention.keep_last :])
    assert going <= set(retention.expired(steps))
    assert going & damaged == set(retention.expired(steps)) & damaged
    if not damaged:
        assert going == set(retention.expired(steps))


# ---- what has changed since it was planned stays


def test_an_attempt_that_wakes_up_stays(manifests: dict[str, bytes]) -> None:
    for wake in (lambda store: put(store, 5, A, 1), lambda store: commit(store, 5, A, manifests)):
        clock, store = on_memory()
        put(store, 5, A)
        pruner = Pruner(store)
        (removal,) = pruner.plan(Root(store).look(), dead_before=NOW + 1)
        clock.now += HOUR
        wake(store)
        before = names(store)
        assert not pruner.remove(removal)
        assert names(store) == before


def test_a_claim_that_was_taken_anew_stays() -> None:
    clock, store = on_memory()
    claim = f"{step_directory(5)}/{MANIFEST_NAME}.claim.tmp"
    store.put_if_absent(claim, b"")
    pruner = Pruner(store)
    (removal,) = pruner.plan(Root(store).look(), dead_before=NOW + 1)
    store.delete(claim)
    clock.now += HOUR
    store.put_if_absent(claim, b"")
    assert not pruner.remove(removal)
    assert names(store) == [claim]


def test_a_step_that_was_removed_and_saved_anew_stays(manifests: dict[str, bytes]) -> None:
    clock, store = on_memory()
    put(store, 5, A)
    commit(store, 5, A, manifests)
    put(store, 6, C)
    commit(store, 6, C, manifests)
    slow = Pruner(store)
    (removal,) = slow.plan(Root(store).look(), Retention(keep_last=1))
    prune(store, keep_last=1)
    clock.now += HOUR
    kept = [*put(store, 5, B), commit(store, 5, B, manifests)]
    assert slow.remove(removal)
    assert set(kept) < set(names(store))
    assert Root(store).steps() == [5, 6]
    assert len(names(store)) == 4


def test_a_step_whose_unreadable_manifest_was_replaced_stays() -> None:
    clock, store = on_memory()
    name = f"{step_directory(5)}/{MANIFEST_NAME}"
    for step in (5, 6):
        store.put_if_absent(f"{step_directory(step)}/{MANIFEST_NAME}", b"?")
    pruner = Pruner(store)
    (removal,) = pruner.plan(Root(store).look(), Retention(keep_last=1))
    store.delete(name)
    clock.now += HOUR
    store.put_if_absent(name, b"!")
    assert not pruner.remove(removal)
    store.delete(name)
    assert pruner.remove(removal)


# ---- the clock


def test_the_time_is_that_of_the_storage(tmp_path: Path) -> None:
    clock, store = on_memory()
    clock.now = 5.0
    assert storage_time(store) == 5.0
    assert names(store) == []
    local = LocalStore(tmp_path / "root")
    told = storage_time(local)
    (tmp_path / "file").write_bytes(b"")
    assert told is not None
    assert abs(told - (tmp_path / "file").stat().st_mtime) < 60
    assert list((tmp_path / "root").iterdir()) == []


def test_a_storage_that_takes_nothing_does_not_tell_the_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fs = FaultyFileSystem().fail_always("mkdir", errno.EROFS)
    assert storage_time(LocalStore(tmp_path / "root", fs)) is None
    assert "what time it is there cannot be told" in caplog.text


def test_what_is_stamped_in_the_future_is_alive() -> None:
    clock, store = on_memory()
    put(store, 5, A)
    clock.now -= 30 * GRACE_SECONDS
    now = storage_time(store)
    assert now == clock.now
    assert prune(store, dead_before=now - GRACE_SECONDS) == []


def run_pruner(store: Store, watch: Clock) -> RunPruner:
    return RunPruner(store, Retention(keep_last=2), monotonic=watch)


def saved(store: Store, step: int, manifests: dict[str, bytes]) -> int:
    put(store, step, C)
    commit(store, step, C, manifests)
    return step


def test_a_run_removes_what_earlier_ones_have_left(manifests: dict[str, bytes]) -> None:
    clock, store = on_memory()
    put(store, 5, A, 0, 1)
    pruner = run_pruner(store, Clock())
    clock.now += GRACE_SECONDS
    pruner.committed(saved(store, 7, manifests), ())
    assert len(names(store)) == 4
    clock.now += 1
    store.delete(f"{step_directory(7)}/{MANIFEST_NAME}")
    store.delete(f"{step_directory(7)}/{rank_file_name(0, C)}")
    run_pruner(store, Clock()).committed(saved(store, 7, manifests), ())
    assert names(store) == sorted([f"{step_directory(7)}/{MANIFEST_NAME}", f"{step_directory(7)}/{rank_file_name(0, C)}"])


@pytest.mark.parametrize(
    ("keep_last", "grace", "goes"), [(2, GRACE_SECONDS, True), (2, 30 * GRACE_SECONDS, False), (None, GRACE_SECONDS, False)]
)
def test_a_checkpointer_removes_dead_attempts(tmp_path: Path, keep_last: int | None, grace: float, goes: bool) -> None:
    store = LocalStore(tmp_path)
    (tmp_path / "week-old").write_bytes(b"")
    then = (tmp_path / "week-old").stat().st_mtime - 7 * GRACE_SECONDS
    (tmp_path / "week-old").unlink()
    dead, alive = put(store, 5, A, 0, 1), put(store, 5, B)
    for name in dead:
        os.utime(tmp_path / name, (then, then))
    with shardckpt.Checkpointer(tmp_path, keep_last=keep_last, options=Options(grace=grace)) as ckpt:
        ckpt.save(7, {"t": torch.ones(3)}, wait=True)
    left = [name for name in names(store) if name.startswith(step_directory(5))]
    assert left == sorted(alive if goes else dead + alive)


def test_a_clock_that_is_put_forward_kills_nobody(manifests: dict[str, bytes]) -> None:
    """Another run, on another host, writes there too, and was last heard of before the jump."""
    clock, store = on_memory()
    watch = Clock(0.0)
    pruner = run_pruner(store, watch)
    pruner.committed(saved(store, 7, manifests), ())
    other = put(store, 5, A)
    clock.now += 30 * GRACE_SECONDS
    watch.now += 60.0
    for step in (8, 9):
        pruner.committed(saved(store, step, manifests), ())
    assert other[0] in names(store)
    assert Root(store).steps() == [8, 9]
    clock.now += 2 * GRACE_SECONDS
    watch.now += 2 * GRACE_SECONDS
    pruner.committed(saved(store, 10, manifests), ())
    assert other[0] not in names(store)


def test_a_clock_that_is_put_back_kills_nobody(manifests: dict[str, bytes]) -> None:
    clock, store = on_memory()
    watch = Clock(0.0)
    pruner = run_pruner(store, watch)
    pruner.committed(saved(store, 7, manifests), ())
    clock.now -= 30 * GRACE_SECONDS
    other = put(store, 5, A)
    pruner.committed(saved(store, 8, manifests), ())
    # and forward again, to what is right
    clock.now += 30 * GRACE_SECONDS
    pruner.committed(saved(store, 9, manifests), ())
    assert other[0] in names(store)


# ---- killed in the middle


class Stop(BaseException):
    """The process is gone."""


class Dying(MemoryStore):
    """A store whose process dies instead of making another change."""

    changes_left = 10**6

    def put_if_absent(self, name: str, data: bytes) -> None:
        self._count()
        super().put_if_absent(name, data)

    def delete(self, name: str) -> None:
        self._count()
        super().delete(name)

    def _count(self) -> None:
        if not self.changes_left:
            raise Stop
        self.changes_left -= 1


@pytest.mark.parametrize("committed_anew", [False, True])
def test_a_prune_that_was_killed_is_finished_by_the_next_one(manifests: dict[str, bytes], committed_anew: bool) -> None:
    """Also without a grace time, and when the step was saved again in between."""
    for changes in range(7):
        store = Dying(f"prune-{next(_numbers)}", Clock())
        put(store, 5, A, 0, 1, 2)
        commit(store, 5, A, manifests)
        newest = [*put(store, 6, C), commit(store, 6, C, manifests)]
        store.changes_left = changes
        try:
            prune(store, keep_last=1)
            assert changes == 6
        except Stop:
            assert changes < 6
        store.changes_left = 10**6
        assert Root(store).steps() == ([5, 6] if changes < 2 else [6])
        anew = []
        if committed_anew and changes >= 2:
            anew = [*put(store, 5, B), commit(store, 5, B, manifests)]
        prune(store, keep_last=2 if anew else 1)
        assert names(store) == sorted([*anew, *newest])


def test_a_step_whose_removal_was_begun_but_is_kept_now_stays_whole(manifests: dict[str, bytes]) -> None:
    clock, store = on_memory()
    kept = [*put(store, 5, A), commit(store, 5, A, manifests), *put(store, 6, C), commit(store, 6, C, manifests)]
    mark = f"{step_directory(5)}/{removal_mark(A)}"
    store.put_if_absent(mark, b"")
    assert prune(store, keep_last=2) == []
    clock.now += HOUR
    (removal,) = prune(store, keep_last=2, dead_before=NOW + 1)
    assert (removal.what, removal.names) == ("temporary", (mark,))
    assert names(store) == sorted(kept)


def test_a_prune_that_was_killed_while_it_put_its_mark_leaves_nothing_for_long(manifests: dict[str, bytes]) -> None:
    _, store = on_memory()
    newest = [*put(store, 6, C), commit(store, 6, C, manifests)]
    for ending in ("0123abcd", "claim"):
        store.put_if_absent(f"{step_directory(5)}/{removal_mark(A)}.{ending}.tmp", b"")
    put(store, 5, A)
    (removal,) = prune(store)
    assert (removal.what, removal.attempt, len(removal.entries)) == ("attempt", A, 3)
    assert names(store) == sorted(newest)


class Vanishing(LocalStore):
    """Another prune removes the temporary file of a mark before it has its name."""

    def put_if_absent(self, name: str, data: bytes) -> None:
        if name.endswith(".tmp"):
            raise MissingFile(f"cannot publish {name}")
        super().put_if_absent(name, data)


def test_two_prunes_take_each_others_marks(tmp_path: Path) -> None:
    with shardckpt.Checkpointer(tmp_path) as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"t": torch.ones(3)}, wait=True)
    assert [removal.step for removal in prune(Vanishing(tmp_path), keep_last=1)] == [1]
    assert Root(LocalStore(tmp_path)).steps() == [2]


def test_a_full_disk_can_be_pruned(tmp_path: Path) -> None:
    with shardckpt.Checkpointer(tmp_path) as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"t": torch.ones(3)}, wait=True)
    store = LocalStore(tmp_path, Full())
    assert [removal.step for removal in prune(store, keep_last=1)] == [1]
    assert Root(store).steps() == [2]
    assert not (tmp_path / step_directory(1)).exists()


class Full(FaultyFileSystem):
    """A disk on which no file can be made."""

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().open(path, flags, mode)
