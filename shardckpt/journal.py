# SPDX-License-Identifier: Apache-2.0
"""The journal of a root: markers that tell of saves which are under way, or have failed.

A marker is a file ``.saves/step-<step>-<attempt>.<state>`` that is put once and never changed. Rank 0 puts ``requested`` and
``staged``, and removes both when the save is durable: from then on the manifest speaks. ``failed`` holds the error, and stays
until the step or a newer one is committed. A save that is killed cannot tell, so its markers are judged by their age and by
what came after them. Nothing else depends on the journal: an error in it is logged, and the save goes on.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Annotated, Literal, get_args

import msgspec

from .errors import AlreadyCommitted, AlreadyExists, CheckpointError, MissingFile, NotACheckpointRoot
from .manifest import step_directory
from .store import Entry, Store, is_temporary

logger = logging.getLogger("shardckpt")

State = Literal["requested", "staged", "failed"]

DIRECTORY = ".saves"
KEPT_FAILURES = 20
"""Failed saves that are remembered at most: the newest ones."""
SILENT_SECONDS = 600.0
"""After this long a save that is not durable is given up, if a newer one was marked or committed since."""
LOST_SECONDS = 86400.0
"""After this long it is given up in any case."""

_STATES: tuple[State, ...] = get_args(State)
_NAME = re.compile(rf"{re.escape(DIRECTORY)}/step-(\d{{8,18}})-([0-9a-f]{{8,32}})\.({'|'.join(_STATES)})(\..+)?\Z", re.ASCII)
_KIND_LENGTH = 100
_MESSAGE_LENGTH = 2000
_MARKER_LIMIT = 16 << 10


class _Failure(msgspec.Struct, forbid_unknown_fields=True):
    """Content of the marker of a failed save; the other markers are empty."""

    error: Annotated[str, msgspec.Meta(max_length=_KIND_LENGTH)]
    message: Annotated[str, msgspec.Meta(max_length=_MESSAGE_LENGTH)]


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """What the journal says of one attempt at a save."""

    step: int
    """Number of the training step."""
    attempt: str
    """Random hex id of the attempt."""
    state: State
    """How far it has come."""
    modified: float
    """When it came there: seconds since the epoch, by the clock of the storage."""
    names: tuple[str, ...]
    """Its markers in the store."""
    error: str = ""
    """Type of the error of a failed save."""
    message: str = ""
    """Its message; as read from the storage, so not to be trusted."""


class Journal:
    """The journal of the root in ``store``. Methods that mark log what goes wrong, and never raise it."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._has_warned = False

    def requested(self, step: int, attempt: str) -> None:
        """Mark that the save was begun; not needed before `staged` if that follows at once."""
        self._mark(step, attempt, "requested")

    def staged(self, step: int, attempt: str) -> None:
        """Mark that rank 0 has its part of the state in host memory."""
        self._mark(step, attempt, "staged")

    def durable(self, step: int, attempt: str) -> None:
        """Remove the markers of a save that is committed, and those that are outdated by now, such as a killed run's."""
        with self._logged(step, attempt, "durable"):
            self._sweep({step: self._clock()})

    def failed(self, step: int, attempt: str, error: BaseException) -> None:
        """Mark that the save failed; to be called when its files are removed, which makes room on a full disk.

        Not marked is that another save has committed the step, and that the place is no root: nothing is put there.
        """
        if isinstance(error, AlreadyCommitted):
            self.durable(step, attempt)
        elif not isinstance(error, NotACheckpointRoot):
            failure = _Failure(_printable(type(error).__name__, _KIND_LENGTH), _printable(str(error), _MESSAGE_LENGTH))
            self._mark(step, attempt, "failed", msgspec.json.encode(failure))
            with self._logged(step, attempt, "failed"):
                self._sweep({}, [_marker(step, attempt, "requested"), _marker(step, attempt, "staged")])

    def entries(self) -> list[JournalEntry]:
        """One entry for each attempt, the latest last. Raises `StoreError`; markers that cannot be read are logged."""
        entries = self._scan()
        kept = _kept_failures(entries)
        return [self._read(entry) if entry.names in kept else entry for entry in entries]

    def _mark(self, step: int, attempt: str, state: State, content: bytes = b"") -> None:
        with self._logged(step, attempt, state), suppress(AlreadyExists):
            self._store.put_if_absent(_marker(step, attempt, state), content)

    @contextmanager
    def _logged(self, step: int, attempt: str, state: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            logger.warning(
                "%s: the journal cannot tell that step %d (%s) is %s: %s", self._store.url, step, attempt, state, error
            )

    def _sweep(self, committed: Mapping[int, float], replaced: Sequence[str] = ()) -> None:
        """Remove what is outdated, and those of the ``replaced`` markers that there are."""
        entries = self._scan()
        gone = {entry.names for entry in outdated(entries, committed, self._clock())}
        for entry in entries:
            for name in entry.names:
                if entry.names in gone or name in replaced:
                    self._store.delete(name)

    def _scan(self) -> list[JournalEntry]:
        """The entries, without the errors of failed saves."""
        markers: dict[tuple[int, str], list[tuple[int, float, str]]] = {}
        for found in self._store.list(DIRECTORY):
            parsed = _parse(found.name)
            if parsed is None:
                self._warn(found.name, "it is no marker")
            else:
                step, attempt, state = parsed
                markers.setdefault((step, attempt), []).append((_STATES.index(state), found.modified, found.name))
        entries = []
        for (step, attempt), of_attempt in markers.items():
            furthest, modified, _ = max(of_attempt)
            names = tuple(name for _, _, name in of_attempt)
            entries.append(JournalEntry(step, attempt, _STATES[furthest], modified, names))
        return sorted(entries, key=lambda entry: (entry.modified, entry.step, entry.attempt))

    def _read(self, entry: JournalEntry) -> JournalEntry:
        name = _marker(entry.step, entry.attempt, "failed")
        try:
            failure = msgspec.json.decode(self._store.get(name, _MARKER_LIMIT), type=_Failure)
        except MissingFile:
            return entry
        except (CheckpointError, msgspec.DecodeError, UnicodeDecodeError) as error:
            self._warn(name, str(error))
            return entry
        return replace(entry, error=failure.error, message=failure.message)

    def _warn(self, name: str, problem: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning("%s holds %r, which is ignored, as are others like it: %s", self._store.url, name, problem)


def fresh_attempts(markers: Iterable[Entry], since: float) -> set[str]:
    """Attempts of which the ``markers`` tell that they were under way at ``since`` or later, by the clock of the storage."""
    parsed = ((entry, _parse(entry.name)) for entry in markers if entry.modified >= since)
    return {found[1] for _, found in parsed if found is not None and found[2] != "failed"}


def outdated(
    entries: Sequence[JournalEntry], committed: Mapping[int, float], now: float, abandoned_before: float = 0.0
) -> list[JournalEntry]:
    """Those of the ``entries``, the latest last, that tell nothing any more.

    ``committed`` has the time of commit of each committed step; times are seconds since the epoch, by the clock of the storage.
    Entries from before ``abandoned_before`` are outdated in any case.
    """
    last = max([*committed.values(), *(entry.modified for entry in entries)], default=0.0)
    kept = _kept_failures(entries)

    def is_outdated(entry: JournalEntry) -> bool:
        if entry.state == "failed":
            made_good = any(step >= entry.step and time >= entry.modified for step, time in committed.items())
            return made_good or entry.names not in kept
        patience = SILENT_SECONDS if last > entry.modified else LOST_SECONDS
        return entry.step in committed or now - entry.modified > patience

    return [entry for entry in entries if entry.modified < abandoned_before or is_outdated(entry)]


def _kept_failures(entries: Sequence[JournalEntry]) -> set[tuple[str, ...]]:
    return {entry.names for entry in [entry for entry in entries if entry.state == "failed"][-KEPT_FAILURES:]}


def _marker(step: int, attempt: str, state: State) -> str:
    return f"{DIRECTORY}/{step_directory(step)}-{attempt}.{state}"


def _parse(name: str) -> tuple[int, str, State] | None:
    found = _NAME.match(name)
    if found is None:
        return None
    step, attempt = int(found[1]), found[2]
    for state in _STATES:
        if name == _marker(step, attempt, state):
            return step, attempt, state
        # what a put that was killed has left: the save was requested at least
        if name.startswith(f"{_marker(step, attempt, state)}.") and is_temporary(name):
            return step, attempt, "requested"
    return None


def _printable(text: str, length: int) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:length])[:length]
