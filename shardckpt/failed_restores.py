# SPDX-License-Identifier: Apache-2.0
"""Which steps of a root could not be restored because they are damaged: so that who starts again does not try them again.

A marker is a file ``.restores/step-<step>-<SHA-256 of the manifest>.damaged`` that is put once and never changed, so it tells
of just that manifest. Its content, the error, is for people. Nothing else depends on markers: an error in them is logged. A
step without its marker is tried once more, and one with a wrong marker can still be asked for by number.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Annotated

import msgspec

from .errors import AlreadyExists, CheckpointError
from .failure import Failure
from .manifest import MANIFEST_LIMIT, MANIFEST_NAME, manifest_digest, step_directory
from .store import Store

logger = logging.getLogger("shardckpt")

DIRECTORY = ".restores"
_NAME = re.compile(rf"{re.escape(DIRECTORY)}/step-(\d{{8,18}})-([0-9a-f]{{64}})\.damaged\Z", re.ASCII)
_KIND_LENGTH = 100
_MESSAGE_LENGTH = 2000
_LIMIT = 16 << 10


class _Content(msgspec.Struct, forbid_unknown_fields=True):
    error: Annotated[str, msgspec.Meta(max_length=_KIND_LENGTH)]
    message: Annotated[str, msgspec.Meta(max_length=_MESSAGE_LENGTH)]


@dataclass(frozen=True, slots=True)
class FailedRestore:
    """A step with a manifest of which a restore has failed."""

    step: int
    """Number of the training step."""
    digest: str
    """SHA-256 of the manifest, in hex."""


class FailedRestores:
    """The markers in ``store``. Methods that change them log what goes wrong, and never raise it."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def entries(self) -> list[FailedRestore]:
        """All of them, by step. Raises `StoreError`. Files that are no markers are passed over."""
        found = []
        for entry in self._store.list(DIRECTORY):
            named = _NAME.match(entry.name)
            if named is not None and entry.name == _marker(int(named[1]), named[2]):
                found.append(FailedRestore(int(named[1]), named[2]))
        return sorted(found, key=lambda failed: (failed.step, failed.digest))

    def standing(self, steps: Container[int]) -> list[FailedRestore]:
        """Those of ``steps`` that still have the manifest with which a restore has failed. Raises `StoreError`."""
        return [failed for failed in self.entries() if failed.step in steps and failed.digest == self._digest(failed.step)]

    def _digest(self, step: int) -> str | None:
        try:
            return manifest_digest(self._store.get(f"{step_directory(step)}/{MANIFEST_NAME}", MANIFEST_LIMIT))
        except CheckpointError:
            # who asks for the step will be told what is wrong with it now
            return None

    def reason(self, failed: FailedRestore) -> str:
        """Type and message of the error, as read from the storage, so not to be trusted; printable, on one line."""
        try:
            content = msgspec.json.decode(self._store.get(_marker(failed.step, failed.digest), _LIMIT), type=_Content)
        except (CheckpointError, msgspec.DecodeError, UnicodeDecodeError):
            return "a restore failed; its marker does not tell why"
        return _printable(f"{content.error}: {content.message}")

    def remember(self, step: int, digest: str, failure: Failure) -> None:
        """Put the marker of a step with a manifest of this SHA-256, if there is none."""
        content = _Content(_printable(failure.kind)[:_KIND_LENGTH], _printable(failure.message)[:_MESSAGE_LENGTH])
        with self._logged(f"remember that step {step} is damaged"), suppress(AlreadyExists):
            self._store.put_if_absent(_marker(step, digest), msgspec.json.encode(content))

    def forget(self, step: int) -> None:
        """Remove the markers of a step: it was restored, verified with all its data, or repaired."""
        self._forget(lambda of: of == step)

    def forget_all_but(self, steps: Callable[[], list[int]]) -> None:
        """Remove the markers of steps that are gone; ``steps`` is called only if there are markers."""
        with self._logged("look for steps that are gone"):
            if self.entries():
                there = set(steps())
                self._forget(lambda of: of not in there)

    def _forget(self, is_over: Callable[[int], bool]) -> None:
        with self._logged("forget what is over"):
            for failed in self.entries():
                if is_over(failed.step):
                    self._store.delete(_marker(failed.step, failed.digest))

    @contextmanager
    def _logged(self, what: str) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            logger.warning("%s/%s: could not %s: %s", self._store.url, DIRECTORY, what, error)


def _marker(step: int, digest: str) -> str:
    return f"{DIRECTORY}/{step_directory(step)}-{digest}.damaged"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
