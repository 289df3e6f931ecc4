# SPDX-License-Identifier: Apache-2.0
"""Prune: plan what a root no longer needs, and remove just that, while others may save, load and prune there.

What may go is told by names and by the clock of the storage alone. An *attempt* at a save has files of its own, whose names are
never used again; the manifest says which attempt is the committed one. So:

- A committed step goes when the retention says so: first the manifest, at once and for good, then the files of its attempt. A
  mark in its directory says so before, so that the next prune finishes what one that was killed has begun.
- An attempt that is not committed is dead when none of its files, and no marker of its save, was written for a grace time.
- Before anything is removed it is looked at again: what has changed since it was planned stays.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import msgspec

from .errors import AlreadyExists, CheckpointError, MissingFile, StorageFull, StoreError
from .failed_restores import DIRECTORY as RESTORES
from .failed_restores import FailedRestores
from .journal import DIRECTORY as JOURNAL
from .journal import fresh_attempts
from .manifest import MANIFEST_LIMIT, MANIFEST_NAME, STEP_PATTERN, step_directory
from .options import GRACE_SECONDS, Retention
from .root import CLOCK_DIRECTORY, FENCE_DIRECTORY, Listing, Root, StepFiles, commit_times, removal_mark
from .store import Entry, Store
from .store.base import TEMPORARY_SUFFIX
from .validate import parse_manifest

logger = logging.getLogger("shardckpt")

_OWN_DIRECTORIES = (JOURNAL, RESTORES, CLOCK_DIRECTORY, FENCE_DIRECTORY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """Files that go together, in the order in which they go."""

    what: Literal["step", "attempt", "temporary", "directory"]
    """A committed step; files of an attempt that is not committed; temporary files; an empty directory."""
    step: int | None
    """Number of the step; None outside the directories of steps."""
    attempt: str | None = None
    """Id of the attempt whose files these are; None when it is not known, or does not matter."""
    entries: tuple[Entry, ...]
    """The files, or the directory."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the store."""
        return tuple(entry.name for entry in self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes that are freed."""
        return sum(entry.size for entry in self.entries)


class _Named(msgspec.Struct):
    """The field of a manifest that is asked for when the others need not hold together."""

    attempt: str


class Pruner:
    """Plans and removes. Any number of them may work on one root at once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._root = Root(store)
        self._newest: int | None = None

    # ---- plan

    def plan(
        self,
        found: Listing,
        retention: Retention | None = None,
        *,
        protected: Collection[int] = (),
        dead_before: float | None = None,
        directories: Sequence[Entry] = (),
    ) -> list[Removal]:
        """What of ``found`` may go.

        Committed steps go as ``retention`` says, for which those do not count that are known to be damaged; never the newest,
        and nothing of ``protected`` steps. With ``dead_before`` (seconds since the epoch, by the clock of the storage) also
        what is not committed and shows no sign of life since then: attempts, temporary files, and those of the empty
        ``directories`` that are the engine's.
        """
        committed = [files.step for files in found.steps if files.committed]
        self._newest = committed[-1] if committed else None
        expired = self._expired(committed, retention or Retention()) - set(protected)
        oldest = dead_before if dead_before is not None else float("-inf")
        alive = fresh_attempts(found.saves, oldest)
        plan: list[Removal] = []
        for files in found.steps:
            if files.step in expired:
                plan.append(self.plan_step(files))
            if files.step not in protected:
                plan += self._plan_rest(files, plan[-1:] if files.step in expired else [], oldest, alive)
        strays = tuple(entry for entry in found.strays if entry.modified < oldest)
        if strays:
            plan.append(Removal(what="temporary", step=None, entries=strays))
        plan += (
            Removal(what="directory", step=_number(entry.name), entries=(entry,))
            for entry in directories
            if entry.modified < oldest and (_number(entry.name) is not None or entry.name in _OWN_DIRECTORIES)
        )
        return plan

    def _expired(self, committed: list[int], retention: Retention) -> set[int]:
        expired = retention.expired(committed)
        damaged = {failed.step for failed in FailedRestores(self._store).standing(committed)} if expired else set()
        if not damaged:
            return set(expired)
        intact = [step for step in committed if step not in damaged]
        self._newest = intact[-1] if intact else self._newest
        return {*retention.expired(intact), *(step for step in expired if step in damaged)}

    def plan_step(self, files: StepFiles) -> Removal:
        """The removal of a committed step. Of the files only those of its own attempt go with it: others may be of a save."""
        assert files.manifest is not None
        by_attempt = files.by_attempt()
        attempt = None
        if len(by_attempt) == 1:
            # the manifest need not hold together for that, and is not checked as a whole, which takes a while
            (sole,) = by_attempt
            attempt = sole if self._named_attempt(files.step) in (sole, None) else None
        elif by_attempt:
            attempt = self._committed_attempt(files.step)
        entries = (files.manifest, *by_attempt.get(attempt or "", ()), *files.removals().get(attempt or "", ()))
        return Removal(what="step", step=files.step, attempt=attempt, entries=entries)

    def _plan_rest(
        self, files: StepFiles, going: Sequence[Removal], oldest: float, alive: Collection[str]
    ) -> Iterator[Removal]:
        """What may go of one step, beside what is ``going``."""
        by_attempt, marks = files.by_attempt(), files.removals()
        taken = {entry for removal in going for entry in removal.entries}
        kept: set[str] = set()
        if files.committed and not going:
            # the usual case costs nothing: one attempt, and it is the committed one
            if len(by_attempt) > 1 or marks:
                committed = self._committed_attempt(files.step)
                kept = {*by_attempt, *marks} if committed is None else {committed}
            else:
                kept = set(by_attempt)
        kept |= {removal.attempt for removal in going if removal.attempt}
        for attempt in sorted({*by_attempt, *marks} - kept):
            entries = tuple(by_attempt.get(attempt, ()))
            # no files appear any more under an id that was committed once, so there is nothing to wait for
            if attempt in marks:
                yield Removal(what="attempt", step=files.step, attempt=attempt, entries=(*entries, *marks[attempt]))
            elif attempt not in alive and all(entry.modified < oldest for entry in entries):
                yield Removal(what="attempt", step=files.step, attempt=attempt, entries=entries)
        gone = {*taken, *(entry for attempt in marks.keys() - kept for entry in marks[attempt])}
        left = tuple(entry for entry in files.temporaries if entry not in gone and entry.modified < oldest)
        if left:
            yield Removal(what="temporary", step=files.step, entries=left)

    # ---- remove

    def remove(self, removal: Removal) -> bool:
        """Carry out one removal of a plan; False when it is left because things have changed since it was planned."""
        match removal.what:
            case "step":
                return self._remove_step(removal)
            case "directory":
                # goes with a file that is not there, if it is still empty
                self._store.delete(f"{removal.names[0]}/empty{TEMPORARY_SUFFIX}")
                return True
            case "attempt" | "temporary":
                if removal.step is not None and not self._is_unchanged(removal, removal.step):
                    return False
                self._delete(removal.names)
                return True

    def _remove_step(self, removal: Removal) -> bool:
        assert removal.step is not None
        self._secure_newest()
        manifest, *files = removal.entries
        mark = f"{step_directory(removal.step)}/{removal_mark(removal.attempt or '')}"
        if removal.attempt is not None:
            # On a full disk it goes without: then what is left by a prune that is killed goes after the grace time. What is
            # missing was removed by another prune: the temporary file of the mark.
            with suppress(AlreadyExists, StorageFull, MissingFile):
                self._store.put_if_absent(mark, b"")
        found = self._root.look_at(removal.step).manifest
        named = self._named_attempt(removal.step) if found and removal.attempt else None
        if found is not None and (found == manifest or named is not None) and named in (removal.attempt, None):
            self._store.delete(manifest.name)
        elif found is not None and named is None:
            # another one, and nobody can tell whose
            return False
        # Also when another prune has taken the manifest, and another save has committed the step since: these files are of the
        # attempt that was removed.
        self._delete(entry.name for entry in files)
        if removal.attempt is not None:
            self._store.delete(mark)
        return True

    def _secure_newest(self) -> None:
        """Make the newest step durable, for which older ones go: who committed it may have been killed before it was."""
        if self._newest is not None:
            with suppress(MissingFile):
                self._store.make_durable(f"{step_directory(self._newest)}/{MANIFEST_NAME}")
            self._newest = None

    def _is_unchanged(self, removal: Removal, step: int) -> bool:
        """Whether nobody has written to the files, nor committed them, since the plan."""
        found = self._root.look_at(step)
        if removal.attempt is not None:
            if any(removal_mark(removal.attempt) in name for name in removal.names):
                return True
            if found.committed and self._committed_attempt(step) in (removal.attempt, None):
                return False
            present = found.by_attempt().get(removal.attempt, [])
        else:
            present = [entry for entry in found.entries if entry.name in removal.names]
        return set(present) <= set(removal.entries)

    def forget_gone(self) -> None:
        """Forget which steps could not be restored that are no more."""
        FailedRestores(self._store).forget_all_but(self._root.steps)

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            self._store.delete(name)

    # ---- the manifest

    def _committed_attempt(self, step: int) -> str | None:
        """The attempt that a manifest names that holds together; None when there is none."""
        try:
            return parse_manifest(self._read_manifest(step)).manifest.attempt
        except CheckpointError:
            return None

    def _named_attempt(self, step: int) -> str | None:
        """The attempt that the manifest names, whether or not the rest of it holds together."""
        try:
            return msgspec.json.decode(self._read_manifest(step), type=_Named).attempt
        except (CheckpointError, msgspec.DecodeError, UnicodeDecodeError):
            return None

    def _read_manifest(self, step: int) -> bytes:
        return self._store.get(f"{step_directory(step)}/{MANIFEST_NAME}", MANIFEST_LIMIT)


def clear_damaged(store: Store, step: int) -> bool:
    """Remove a committed step of which a restore has failed, as it is damaged; False when that is not known of its manifest."""
    files, pruner = Root(store).look_at(step), Pruner(store)
    if files.manifest is None or not FailedRestores(store).standing([step]):
        return False
    logger.warning("%s: step %d, which is damaged, is removed, as it is saved anew", store.url, step)
    return pruner.remove(pruner.plan_step(files))


class RunPruner:
    """Prunes the root of one run after each of its commits, by the listing that this takes anyway. On rank 0."""

    def __init__(
        self,
        store: Store,
        retention: Retention,
        grace: float = GRACE_SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = Root(store)
        self._pruner = Pruner(store)
        self._retention = retention
        self._grace = grace
        self._monotonic = monotonic
        self._earliest: tuple[float, float] | None = None

    def committed(self, step: int, reading: Collection[int]) -> None:
        """Remove what may go, now that ``step`` is committed; never it, nor the steps that are being read.

        Raises `CheckpointError`.
        """
        found = self._root.look()
        # the manifest was written a moment ago, so its time is that of the storage
        now = commit_times(found.steps).get(step)
        dead_before = None if now is None else self._bounded(now) - self._grace
        plan = self._pruner.plan(found, self._retention, protected={step, *reading}, dead_before=dead_before)
        for removal in plan:
            self._pruner.remove(removal)
        if any(removal.what == "step" for removal in plan):
            self._pruner.forget_gone()

    def _bounded(self, now: float) -> float:
        """The time of the storage, or an earlier one if its clock was put forward since this run has first looked at it."""
        watch = self._monotonic()
        if self._earliest is not None:
            now = min(now, self._earliest[0] + watch - self._earliest[1])
        self._earliest = now, watch
        return now


def storage_time(store: Store) -> float | None:
    """The time that the storage stamps on a file that is written now; None, with a warning, when nothing can be written there.

    To be asked for before a listing: what is written in between is then younger, also if the clock is put forward.
    """
    name = f"{CLOCK_DIRECTORY}/{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
    try:
        store.put_if_absent(name, b"")
        try:
            return next((entry.modified for entry in store.list(CLOCK_DIRECTORY) if entry.name == name), None)
        finally:
            store.delete(name)
    except StoreError as error:
        logger.warning("%s: what time it is there cannot be told: %s", store.url, error)
        return None


def _number(directory: str) -> int | None:
    found = STEP_PATTERN.match(directory)
    return int(found[1]) if found else None
