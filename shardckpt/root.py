# SPDX-License-Identifier: Apache-2.0
"""A root: the directory of a run, with one directory per step. What is there, and what of it is committed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .errors import CheckpointNotFound, MissingFile, NotACheckpointRoot
from .journal import DIRECTORY as JOURNAL
from .manifest import FILE_PATTERN, MANIFEST_NAME, STEP_PATTERN, step_directory
from .parity.layout import PARITY_PATTERN, PARITY_RECORD_PATTERN
from .store import Entry, Store, is_temporary

CLOCK_DIRECTORY = ".clock"
"""Where files are put for a moment, to see what time the storage stamps on them."""
FENCE_DIRECTORY = ".fences"
"""Where the marks of a run's starts are."""
_REMOVAL = re.compile(r"removing-([0-9a-f]{8,32})\.tmp(?:\.[0-9a-f]{8}\.tmp|\.claim\.tmp)?\Z", re.ASCII)
_PARITY = re.compile(r"parity(?:-\d{5,9}-\d{5,9})?-([0-9a-f]{8,32})\.(?:xor|json)\Z", re.ASCII)
_STRAY = re.compile(
    rf"((probe|{re.escape(MANIFEST_NAME)})\.[0-9a-f]{{8}}|({re.escape(CLOCK_DIRECTORY)}|{re.escape(FENCE_DIRECTORY)})/[^/]+)\.tmp\Z",
    re.ASCII,
)


def removal_mark(attempt: str) -> str:
    """Name, in the directory of a step, of the file that says that a committed attempt is being removed."""
    return f"removing-{attempt}.tmp"


@dataclass(frozen=True, slots=True)
class StepFiles:
    """What is under the directory of one step."""

    step: int
    """Number of the step."""
    entries: tuple[Entry, ...]
    """All files."""

    @property
    def committed(self) -> bool:
        """Whether there is a manifest."""
        return self.manifest is not None

    @property
    def committed_at(self) -> float | None:
        """When the manifest was published: seconds since the epoch, by the clock of the storage; None without one."""
        return self.manifest.modified if self.manifest is not None else None

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.entries)

    @property
    def manifest(self) -> Entry | None:
        """The manifest, if there is one."""
        return next((entry for entry in self.entries if _leaf(entry) == MANIFEST_NAME), None)

    def by_attempt(self) -> dict[str, list[Entry]]:
        """Files of ranks, by the id of the attempt at a save that they are of."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            attempt = attempt_of(_leaf(entry))
            if attempt is not None:
                found.setdefault(attempt, []).append(entry)
        return found

    def removals(self) -> dict[str, list[Entry]]:
        """What says that a committed attempt is being removed, by attempt."""
        marks: dict[str, list[Entry]] = {}
        for entry in self.entries:
            found = _REMOVAL.match(_leaf(entry))
            if found is not None:
                marks.setdefault(found[1], []).append(entry)
        return marks

    @property
    def temporaries(self) -> tuple[Entry, ...]:
        """What the store has made for its own use, and the marks of removals."""
        return tuple(entry for entry in self.entries if is_temporary(entry.name))


@dataclass(frozen=True, slots=True)
class Listing:
    """What one listing of a root shows."""

    steps: list[StepFiles]
    """The directories of steps, by step."""
    saves: tuple[Entry, ...]
    """The journal of saves."""
    strays: tuple[Entry, ...]
    """Temporary files outside the directories of steps."""

    @property
    def is_known(self) -> bool:
        """Whether there is anything that a run has put there."""
        return bool(self.steps or self.saves or self.strays)


class Root:
    """The step directories in a store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def look(self) -> Listing:
        """All there is, by one listing."""
        by_step: dict[int, list[Entry]] = {}
        saves, strays = [], []
        for entry in self._store.list():
            step = _step_of(entry.name)
            if step is not None:
                by_step.setdefault(step, []).append(entry)
            elif entry.name.startswith(f"{JOURNAL}/"):
                saves.append(entry)
            elif _STRAY.match(entry.name):
                strays.append(entry)
        return Listing([StepFiles(step, tuple(by_step[step])) for step in sorted(by_step)], tuple(saves), tuple(strays))

    def look_at(self, step: int) -> StepFiles:
        """What is there of one step, which may be nothing."""
        entries = self._store.list(step_directory(step))
        return StepFiles(step, tuple(entry for entry in entries if _step_of(entry.name) == step))

    def scan(self) -> list[StepFiles]:
        """All step directories, committed or not, by step."""
        return self.look().steps

    def steps(self) -> list[int]:
        """The committed steps, ascending."""
        return [found.step for found in self.scan() if found.committed]

    def require_place(self, prefix: str) -> None:
        """Raise `NotACheckpointRoot` when other things are where a checkpoint is to go: most likely the wrong directory.

        A root ("step-.../") may hold other things beside its steps, once it has steps. A place of its own ("") may not.
        """
        foreign = None
        for entry in self._store.list():
            is_step = _step_of(entry.name) is not None
            if is_step and prefix:
                return
            ours = _is_known_file(entry.name) and (not prefix or entry.name != MANIFEST_NAME)
            if not ours and not entry.name.startswith("."):
                foreign = MANIFEST_NAME if entry.name == MANIFEST_NAME else foreign or entry.name
        if foreign is None:
            return
        if foreign == MANIFEST_NAME:
            raise self._is_checkpoint()
        part = "step" if prefix else "part of this checkpoint"
        raise NotACheckpointRoot(
            f"{self._store.url} holds {foreign!r}, which is no {part}. Use a new or an empty directory",
            url=self._store.url,
            found=foreign,
        )

    def require_no_checkpoint(self) -> None:
        """Raise `NotACheckpointRoot` when this is a checkpoint itself, or the directory of one step."""
        if any(entry.name == MANIFEST_NAME for entry in self._store.list()):
            raise self._is_checkpoint()

    def _is_checkpoint(self) -> NotACheckpointRoot:
        return NotACheckpointRoot(
            f"{self._store.url} is itself a checkpoint, and no root with a directory for each step. Name the directory above "
            "it, if that is one, or take shardckpt.load for this checkpoint alone",
            url=self._store.url,
            found=MANIFEST_NAME,
        )


def commit_times(found: Iterable[StepFiles]) -> dict[int, float]:
    """When each committed step was committed: seconds since the epoch, by the clock of the storage."""
    return {files.step: files.committed_at for files in found if files.committed_at is not None}


def find_checkpoint(store: Store) -> str:
    """Prefix of the checkpoint in a store: its root, or the newest committed step."""
    try:
        store.open(MANIFEST_NAME).close()
        return ""
    except MissingFile:
        steps = Root(store).steps()
    if not steps:
        raise CheckpointNotFound(f"there is no committed checkpoint in {store.url}", url=store.url)
    return f"{step_directory(steps[-1])}/"


def _step_of(name: str) -> int | None:
    directory, _, file = name.partition("/")
    found = STEP_PATTERN.match(directory)
    if found is None or not _is_known_file(file) or step_directory(int(found[1])) != directory:
        return None
    return int(found[1])


def attempt_of(file: str) -> str | None:
    """The attempt that a file in the directory of a checkpoint is of, by its name; None when the name does not tell."""
    found = FILE_PATTERN.match(file) or PARITY_PATTERN.match(file) or PARITY_RECORD_PATTERN.match(file)
    return found[found.re.groups] if found else None


def _is_known_file(file: str) -> bool:
    return "/" not in file and (file == MANIFEST_NAME or attempt_of(file) is not None or is_temporary(file))


def _leaf(entry: Entry) -> str:
    return entry.name.rpartition("/")[2]
