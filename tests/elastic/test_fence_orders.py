# SPDX-License-Identifier: Apache-2.0
"""Fences in every order: a new start begins at each moment of a commit of an old one, and is itself stopped at each moment.

Both are stopped at one call of the file system each, which gives every order of their calls with up to three changes of turn.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from shardckpt.errors import AlreadyCommitted, Superseded
from shardckpt.fencing import Fence, clear_outdated, raise_fence
from shardckpt.finish import Job, _publish_fenced, is_surely_uncommitted
from shardckpt.manifest import MANIFEST_NAME, rank_file_name, step_directory
from shardckpt.root import Root
from shardckpt.store import LocalStore
from shardckpt.store.publish import Publisher
from shardckpt.validate import parse_manifest
from tests.engine.simulate import by_hand, invented_receipts, manifest_of
from tests.engine.waiting import InThread
from tests.store.faults import FaultyFileSystem, Killed, WithoutLinks

PATIENCE = 120.0
RUN, STEP, BEFORE = "job", 100, 90
NAMING = ("link", "rename", "unlink", "listdir")
"""The calls that give names, take them away, or look for them."""
PREFIX = f"{step_directory(STEP)}/"


class Unrevoked(LocalStore):
    """A store that cannot revoke, as in buckets."""

    def put_if_allowed(self, name: str, data: bytes, allow: Callable[[], None]) -> None:
        allow()
        super().put_if_absent(name, data)

    def revoke(self, name: str) -> None:
        pass


class Actor:
    """Does something in a thread, until it is stopped before one of its calls, and then the rest."""

    def __init__(
        self, work: Callable[[LocalStore], str], kind: type[LocalStore], root: Path, fs: FaultyFileSystem, stop: int
    ) -> None:
        self._reached, self._go_on = threading.Event(), threading.Event()
        self._work = work
        # who is stopped with a claim does not let go of it, however long one waits
        self._store = kind(root, fs, Publisher(fs, patience=0.0))
        self._thread: InThread[str] | None = None
        fs.strike(stop, self._pause)

    def _pause(self, operation: Callable[..., Any], *args: Any) -> Any:
        self._reached.set()
        if not self._go_on.wait(PATIENCE):
            raise TimeoutError("nobody let it go on")
        return operation(*args)

    def begin(self) -> None:
        """Go as far as to the stop, or to the end."""

        def run() -> str:
            try:
                return self._work(self._store)
            finally:
                self._reached.set()

        self._thread = InThread(run)
        assert self._reached.wait(PATIENCE)

    def end(self) -> str:
        """Do the rest; what has come of it."""
        assert self._thread is not None
        self._go_on.set()
        return self._thread.result()


def attempt_of(fence: Fence) -> str:
    """The one attempt of a start."""
    return f"{fence.stamp}0123456789abcdef"


def manifest_by(fence: Fence) -> bytes:
    """The manifest of what a start saves."""
    plan = by_hand(1, {})
    return manifest_of(plan, invented_receipts(plan, attempt_of(fence)), attempt_of(fence))


def commit(store: LocalStore, fence: Fence) -> str:
    """Commit step `STEP`, whose files are there; what is said of it."""
    attempt = attempt_of(fence)
    store.put_if_absent(f"{PREFIX}{rank_file_name(0, attempt)}", b"data")
    data = manifest_by(fence)
    job = Job(prefix=PREFIX, step=STEP, attempt=attempt, header=b"", block_size=1, draft=None, fence=fence)
    try:
        _publish_fenced(job, fence, store, data)
    except (Superseded, AlreadyCommitted) as error:
        return "nothing" if is_surely_uncommitted(error) else "unknown"
    return "done"


def start_anew(store: LocalStore) -> str:
    """Begin a start, look from which step it goes on, and save `STEP` if that is not there."""
    fence = raise_fence(store, RUN)
    chosen = max(Root(store).steps())
    fence = Fence(run=fence.run, generation=fence.generation, newest=max(fence.newest, chosen))
    return f"{chosen} {commit(store, fence)}" if chosen < STEP else f"{chosen}"


def generation_of(store: LocalStore) -> int:
    """Of the start whose save of `STEP` counts; 0 without one."""
    if not Root(store).look_at(STEP).committed:
        return 0
    attempt = parse_manifest(store.get(f"{PREFIX}{MANIFEST_NAME}", 1 << 20)).manifest.attempt
    return int(attempt[8:16], 16)


def a_root(folder: Path) -> Fence:
    """A run whose first start has committed a step before."""
    store = LocalStore(folder, FaultyFileSystem())
    fence = raise_fence(store, RUN)
    store.put_if_absent(f"{step_directory(BEFORE)}/{MANIFEST_NAME}", b"{}")
    return fence


def moments(folder: Path, kind: type[LocalStore], system: type[FaultyFileSystem]) -> tuple[list[int], list[int]]:
    """The numbers of the calls by which the old start and the new one can notice each other."""
    found = []
    for name, work in (("old", commit), ("new", lambda store, _: start_anew(store))):
        fence, fs = a_root(folder / name), system()
        work(kind(folder / name, fs), fence)
        found.append([number for number, call in enumerate(fs.names(), 1) if call in NAMING])
    return found[0], found[1]


def outcomes(folder: Path, kind: type[LocalStore], system: type[FaultyFileSystem]) -> set[tuple[str, str, int]]:
    """Over all orders: what comes of the old start's save, what the new one does, and whose save counts in the end."""
    found = set()
    for number, (i, j) in enumerate(itertools.product(*moments(folder, kind, system))):
        root = folder / f"{number}"
        fence = a_root(root)
        old = Actor(partial(commit, fence=fence), kind, root, system(), i)
        new = Actor(start_anew, kind, root, system(), j)
        first, second = (old, new) if number % 2 else (new, old)
        first.begin()
        second.begin()
        told = {first: first.end()}
        told[second] = second.end()
        found.add((told[old], told[new], generation_of(kind(root))))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("system", [FaultyFileSystem, WithoutLinks])
def test_nothing_is_added_to_what_a_new_start_has_seen(tmp_path: Path, system: type[FaultyFileSystem]) -> None:
    expected = {("done", "100", 1), ("unknown", "100", 1), ("nothing", "90 done", 2)}
    assert outcomes(tmp_path, LocalStore, system) == expected


def test_where_nothing_can_be_revoked_the_new_start_wins(tmp_path: Path) -> None:
    """What came too late gives way, although nobody can tell that from what came in time."""
    expected = {("done", "100", 1), ("unknown", "100", 1), ("nothing", "90 done", 2), ("unknown", "90 done", 2)}
    assert outcomes(tmp_path, Unrevoked, FaultyFileSystem) == expected


def test_who_is_killed_with_a_claim_blocks_the_next_start_of_nothing(tmp_path: Path) -> None:
    """Without hard links, between the claim to the manifest's name and the manifest."""
    trial = WithoutLinks()
    commit(LocalStore(tmp_path / "trial", trial), a_root(tmp_path / "trial"))
    calls = [number for number, name in enumerate(trial.names()) if name == "rename"][-1]
    root = tmp_path / "run"
    fence = a_root(root)
    with pytest.raises(Killed):
        commit(LocalStore(root, WithoutLinks().die_after(calls)), fence)
    assert (root / PREFIX / f"{MANIFEST_NAME}.claim.tmp").exists()
    plain = WithoutLinks()
    assert start_anew(LocalStore(root, plain, Publisher(plain, patience=0.0))) == "90 done"
    assert generation_of(LocalStore(root)) == 2


def test_a_start_that_was_killed_with_the_claim_to_its_mark_is_followed_by_others(tmp_path: Path) -> None:
    """Without hard links; the number that it claimed is no start's."""
    a_root(tmp_path)
    trial = WithoutLinks()
    raise_fence(LocalStore(tmp_path, trial), RUN)
    call = trial.names().index("rename")
    with pytest.raises(Killed):
        raise_fence(LocalStore(tmp_path, WithoutLinks().die_after(call)), RUN)
    marks = [entry.name for entry in LocalStore(tmp_path).list(".fences")]
    assert any(name.endswith("-00000002") for name in marks)
    assert any(name.endswith("-00000003.claim.tmp") for name in marks)
    for generation in (4, 5):
        plain = WithoutLinks()
        assert raise_fence(LocalStore(tmp_path, plain, Publisher(plain, patience=0.0)), RUN).generation == generation


class Overtaken(LocalStore):
    """A store in which two other starts begin between the listing of marks and a mark."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.others: list[Fence] = []

    def put_if_absent(self, name: str, data: bytes) -> None:
        if name.startswith(".fences/") and not self.others:
            other = LocalStore(self.url)
            self.others += [raise_fence(other, RUN), raise_fence(other, RUN)]
        super().put_if_absent(name, data)


def test_a_start_that_was_overtaken_is_the_newest_all_the_same(tmp_path: Path) -> None:
    """The number that it had in mind is free again, as a newer one has taken its mark away."""
    store = Overtaken(tmp_path)
    assert raise_fence(store, RUN).generation == 3
    assert [fence.generation for fence in store.others] == [1, 2]
    assert [entry.name[-8:] for entry in store.list(".fences")] == ["00000003"]


def test_what_a_newer_start_has_resumed_from_is_not_taken_away_by_one_in_between(tmp_path: Path) -> None:
    """Where nothing can be revoked: the first start publishes late, the third one goes on from that, the second comes to it."""
    first = a_root(tmp_path)
    store = Unrevoked(tmp_path)
    second = raise_fence(store, RUN)
    assert second.newest == BEFORE
    store.put_if_absent(f"{PREFIX}{rank_file_name(0, attempt_of(first))}", b"data")
    store.put_if_absent(f"{PREFIX}{MANIFEST_NAME}", manifest_by(first))
    assert raise_fence(store, RUN).newest == STEP
    with pytest.raises(Superseded):
        clear_outdated(store, second, STEP)
    assert commit(store, second) == "nothing"
    assert generation_of(store) == 1
