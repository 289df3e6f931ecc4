# SPDX-License-Identifier: Apache-2.0
"""A root: the directory of a run, with one directory per step. What is committed there, and what may go."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .errors import CheckpointNotFound, MissingFile, NotACheckpointRoot
from .manifest import FILE_PATTERN, MANIFEST_NAME, STEP_PATTERN, step_directory
from .options import Retention
from .store import Entry, Store, is_temporary


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
        return self.committed_at is not None

    @property
    def committed_at(self) -> float | None:
        """When the manifest was published: seconds since the epoch, by the clock of the storage; None without one."""
        return next((entry.modified for entry in self.entries if entry.name.endswith(f"/{MANIFEST_NAME}")), None)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.entries)


@dataclass(frozen=True, slots=True)
class Removal:
    """One step of a plan to prune: files in the order in which they go, the manifest first."""

    step: int
    """Number of the step."""
    names: tuple[str, ...]
    """Names in the store."""
    nbytes: int
    """Bytes that are freed."""


class Root:
    """The step directories in a store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def scan(self) -> list[StepFiles]:
        """All step directories, committed or not, by step."""
        by_step: dict[int, list[Entry]] = {}
        for entry in self._store.list():
            step = _step_of(entry.name)
            if step is not None:
                by_step.setdefault(step, []).append(entry)
        return [StepFiles(step, tuple(by_step[step])) for step in sorted(by_step)]

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
                foreign = foreign or entry.name
        if foreign is not None:
            raise NotACheckpointRoot(
                f"{self._store.url} holds {foreign!r}, which is no {'step' if prefix else 'part of this checkpoint'}. "
                "Use a new or an empty directory",
                url=self._store.url,
                found=foreign,
            )

    def plan_prune(
        self, retention: Retention, protected: Iterable[int] = (), abandoned_before: float | None = None
    ) -> list[Removal]:
        """What goes under ``retention``: committed steps only, never the newest, never ``protected`` ones.

        With ``abandoned_before`` (seconds since the epoch, by the clock of the storage) also steps without a manifest of which
        no file was written since then: what a save or a prune has left behind that was killed.
        """
        found = {files.step: files for files in self.scan()}
        going = set(retention.expired([step for step, files in found.items() if files.committed]))
        if abandoned_before is not None:
            going |= {s for s, f in found.items() if not f.committed and all(e.modified < abandoned_before for e in f.entries)}
        return [
            Removal(step, tuple(sorted((e.name for e in found[step].entries), key=_manifest_first)), found[step].nbytes)
            for step in sorted(going - set(protected))
        ]

    def prune(self, removals: Iterable[Removal]) -> None:
        """Carry out a plan. A step without its manifest is no checkpoint, so it disappears at once, whatever follows."""
        for removal in removals:
            for name in removal.names:
                self._store.delete(name)


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


def _is_known_file(file: str) -> bool:
    return file == MANIFEST_NAME or FILE_PATTERN.match(file) is not None or is_temporary(file)


def _manifest_first(name: str) -> tuple[bool, str]:
    return not name.endswith(f"/{MANIFEST_NAME}"), name
