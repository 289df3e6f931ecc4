# SPDX-License-Identifier: Apache-2.0
"""Restore: which step of a root is loaded, and what happens when it is damaged.

A step that turns out to be damaged is remembered beside the steps (`shardckpt.failed_restores`). With ``fallback`` the newest
older step that is intact is restored instead, on all ranks alike: they judge by the error that all of them were told.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from .coordinate import Coordinator
from .errors import (
    CheckpointError,
    CheckpointNotFound,
    CheckpointRemoved,
    ChecksumMismatch,
    ConfigError,
    IntegrityError,
    InvalidManifest,
    MissingFile,
    NotShared,
    StoreError,
    TruncatedFile,
    UnsupportedVersion,
)
from .events import Sink
from .failed_restores import FailedRestores
from .failure import rebuild
from .loading import Load, Restored
from .manifest import manifest_digest, step_directory
from .options import Options
from .root import Root
from .store import Store
from .targets import Selection
from .wire import name_ranks

logger = logging.getLogger("shardckpt")

_DAMAGE = (ChecksumMismatch, InvalidManifest, MissingFile, TruncatedFile)
"""A newer version is not damage, and neither is a manifest that ``expect_digest`` refuses: both are for the user to settle."""
_SHOWN = 8
_MOST_TRIES = 10


class _Candidates(msgspec.Struct):
    """Steps to try, in this order, and those that are not tried: (step, what is wrong with it)."""

    steps: list[int]
    skipped: list[tuple[int, str]]


@dataclass(frozen=True, slots=True)
class Restoring:
    """Restores steps of one root; collective."""

    coordinator: Coordinator
    """Of all ranks."""
    store: Store
    """Holds the root."""
    options: Options
    """Of loads."""
    sink: Sink
    """Is told how long things take."""
    reading: set[int]
    """Holds the step that is being read, for whoever prunes."""

    def run(self, state: Mapping[str, Any], selection: Selection, step: int | None, *, fallback: bool) -> Restored | None:
        """Restore ``step``, or the newest one; with ``fallback`` the newest intact one up to there. None when there is no step.

        Raises `CheckpointNotFound` for a step that is not committed, and the errors of the load. With ``fallback`` that of the
        newest step when none is intact; the detail ``tried`` then says what is wrong with each. When a prune of somebody else's
        removes the newest step while it is read, there is a newer one, which is restored instead.
        """
        if fallback and selection.expect_digest is not None:
            raise ConfigError("fallback=True may restore any step, and expect_digest= names one: leave one of them out")
        filled: set[str] = set()
        gone: Exception | None = None
        for _ in range(_MOST_TRIES):
            loads: list[Load] = []
            try:
                restored = self._try_steps(state, selection, step, fallback, filled, loads)
            except Exception as error:
                if step is not None or not loads or not _was_removed(loads[-1]):
                    raise
                logger.warning("restore: %s", error)
                gone = error
            else:
                if restored is None and gone is not None:
                    break
                return restored
        assert gone is not None
        raise gone

    def _try_steps(
        self,
        state: Mapping[str, Any],
        selection: Selection,
        step: int | None,
        fallback: bool,
        filled: set[str],
        loads: list[Load],
    ) -> Restored | None:
        """Restore the first step that can be; ``filled`` and ``loads`` tell what was done until an error came."""
        packed = self.coordinator.broadcast("restore: find", lambda: msgspec.json.encode(self._find(step, fallback)))
        found = msgspec.json.decode(packed, type=_Candidates)
        skipped = found.skipped
        for number, why in skipped:
            logger.warning("step %d of %s is skipped, as a restore of it has failed before: %s", number, self.store.url, why)
        newest: Exception | None = None
        for number in found.steps:
            prefix = f"{step_directory(number)}/"
            load = Load(self.coordinator, self.store, prefix, selection, self.options, self.sink, frozenset(filled))
            loads.append(load)
            self.reading.add(number)
            try:
                restored = load.run(state)
            except Exception as error:
                filled |= load.filled
                reason = self._judge(number, load)
                if reason is None or not fallback:
                    raise
                logger.warning("step %d of %s is damaged, an older one is tried: %s", number, self.store.url, reason)
                skipped.append((number, reason))
                newest = newest or error
            else:
                self._forget(number, selection)
                return replace(restored, info=replace(restored.info, skipped=tuple(sorted(skipped, reverse=True))))
            finally:
                self.reading.discard(number)
        if newest is None:
            if not skipped:
                self._require_nothing_elsewhere()
            return None
        if isinstance(newest, CheckpointError):
            skipped.sort(reverse=True)
            newest.add(f"No older step is intact. Tried were: {_listed(skipped)}", tried=[number for number, _ in skipped])
        raise newest

    def _find(self, step: int | None, fallback: bool) -> _Candidates:
        """On rank 0: the steps to try."""
        steps = Root(self.store).steps()
        if not steps:
            # else a run that was given the directory of one step would begin anew, and be told at its first save
            Root(self.store).require_no_checkpoint()
        if step is not None and step not in steps:
            raise CheckpointNotFound(
                f"step {step!r} is not committed in {self.store.url}; committed are {steps[-8:] if steps else 'none'}",
                step=step,
                steps=steps,
            )
        if not fallback:
            return _Candidates(steps[-1:] if step is None else [step], [])
        candidates = [number for number in reversed(steps) if step is None or number <= step]
        damaged = self._find_damaged({*candidates} - {step})
        found = _Candidates([number for number in candidates if number not in damaged], sorted(damaged.items(), reverse=True))
        if damaged and not found.steps:
            raise IntegrityError(
                f"no step of {self.store.url} is intact: a restore of each has failed before: {_listed(found.skipped)}. "
                "Ask for one by number to try it again, or verify it with --read-data",
                tried=[number for number, _ in found.skipped],
            )
        return found

    def _require_nothing_elsewhere(self) -> None:
        """Raise `NotShared` when other ranks see steps here: else a job whose rank 0 lacks a mount would begin anew."""

        def compare(found: list[bytes]) -> bytes:
            newest = {rank: steps[0] for rank, packed in enumerate(found) if (steps := msgspec.msgpack.decode(packed))}
            # what is there for rank 0 by now was saved in between
            if newest and not Root(self.store).steps():
                hosts = self.coordinator.hosts
                raise NotShared(
                    f"{self.store.url} is empty for rank 0 ({hosts[0]}), and holds step {max(newest.values())} for "
                    f"{name_ranks(list(newest), hosts)}: the directory is not shared between the hosts. Mount the file system "
                    "with the checkpoints at this place on each host; to begin anew, name another place",
                    ranks=list(newest),
                )
            return b""

        # by all ranks, which costs next to nothing where there is nothing
        self.coordinator.round("restore: find nothing", lambda: msgspec.msgpack.encode(Root(self.store).steps()[-1:]), compare)

    def _find_damaged(self, steps: Set[int]) -> dict[int, str]:
        """Those of ``steps`` whose restore has failed before, with the manifest that they have now, and why."""
        failed_restores = FailedRestores(self.store)
        found: dict[int, str] = {}
        try:
            for failed in failed_restores.standing(steps):
                found[failed.step] = failed_restores.reason(failed)
        except StoreError as error:
            logger.warning("it is not known which steps of %s are damaged: %s", self.store.url, error)
        return found

    def _judge(self, step: int, load: Load) -> str | None:
        """What is wrong with a step whose load has failed, the same on all ranks; None when it is not damaged."""
        failure = load.failure
        if failure is None or not is_damage(rebuild(failure)):
            return None
        if load.manifest:
            FailedRestores(self.store).remember(step, manifest_digest(load.manifest), failure)
        return f"{failure.kind}: {failure.message}"

    def _forget(self, step: int, selection: Selection) -> None:
        """What is restored now was not damaged, or is no longer."""
        if self.coordinator.rank == 0 and selection.keys is None:
            FailedRestores(self.store).forget(step)


def is_damage(error: CheckpointError) -> bool:
    """Whether an error of a load says that the checkpoint is damaged, and not that it is another one than was asked for."""
    return isinstance(error, _DAMAGE) and not isinstance(error, UnsupportedVersion)


def _was_removed(load: Load) -> bool:
    return load.failure is not None and isinstance(rebuild(load.failure), CheckpointRemoved)


def _listed(skipped: Sequence[tuple[int, str]]) -> str:
    shown = "; ".join(f"step {number} ({reason})" for number, reason in skipped[:_SHOWN])
    return shown if len(skipped) <= _SHOWN else f"{shown}; and {len(skipped) - _SHOWN} older ones"
