# SPDX-License-Identifier: Apache-2.0
"""`Checkpointer`: the checkpoints of one run, by step, in one root."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import msgspec

from .api import check_metadata, check_step
from .coordinate import Coordinator
from .errors import CheckpointerClosed, CheckpointNotFound, StoreError
from .loading import Load, Restored
from .manifest import step_directory
from .options import Options, Retention
from .root import Root
from .saving import Saved, Saver
from .store import open_store
from .targets import Selection

logger = logging.getLogger("shardckpt")


class SaveHandle:
    """A save that was asked for. `Checkpointer.save` blocks until it is durable, so a handle is always done."""

    def __init__(self, saved: Saved) -> None:
        self._saved = saved

    def done(self) -> bool:
        """Whether the save is durable."""
        return True

    def wait_staged(self) -> None:
        """Return as soon as the state may be changed again."""

    def result(self, timeout: float | None = None) -> Saved:
        """The committed save; waits for at most ``timeout`` seconds."""
        return self._saved


class Checkpointer:
    """Saves and restores the state of one training run, one directory per step.

    Collective: every rank of the default process group makes one and calls the same methods in the same order; a single
    process needs no process group. Usable as a context manager.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        options: Options | None = None,
    ) -> None:
        """Open ``root`` (a path, or a URL such as ``s3://bucket/run``), which is made at the first save.

        After each commit all steps but the ``keep_last`` newest go, and those that are multiples of ``keep_every`` stay.
        """
        self._options = options or Options()
        self._retention = Retention(keep_last=keep_last, keep_every=keep_every)
        self._store = open_store(root)
        self._root = Root(self._store)
        self._coordinator = Coordinator.connect(timeout=self._options.timeout)
        self._saver = Saver(self._coordinator, self._store, self._options)
        self._reading: set[int] = set()
        self._closed = False

    @property
    def url(self) -> str:
        """The root."""
        return self._store.url

    def steps(self) -> list[int]:
        """The committed steps, ascending. Not collective: what this rank sees now."""
        return self._root.steps()

    def save(self, step: int, state: Mapping[str, Any], *, metadata: Mapping[str, Any] | None = None) -> SaveHandle:
        """Save ``state`` as ``step``. Raises `AlreadyCommitted` when the step exists; nothing is ever overwritten."""
        self._require_open()
        check_step(step)
        check_metadata(metadata)
        saved = self._saver.save(f"{step_directory(step)}/", step, state, metadata or {})
        self._prune(step)
        return SaveHandle(saved)

    def restore(
        self,
        state: Mapping[str, Any],
        *,
        step: int | None = None,
        keys: Sequence[str] | None = None,
        strict: bool = True,
        convert_dtype: bool = False,
        expect_digest: str | None = None,
    ) -> Restored | None:
        """Load ``step``, or the newest committed one, into ``state`` in place; None when there is none to resume from.

        A ``step`` that is not committed raises `CheckpointNotFound`. The other arguments are those of `shardckpt.load`.
        """
        self._require_open()
        selection = Selection(keys=keys, strict=strict, convert_dtype=convert_dtype, expect_digest=expect_digest)
        chosen = msgspec.json.decode(self._coordinator.broadcast("restore: find", lambda: self._choose(step)))
        if chosen is None:
            return None
        self._reading.add(chosen)
        try:
            prefix = f"{step_directory(chosen)}/"
            return Load(self._coordinator, self._store, prefix, selection, self._options).run(state)
        finally:
            self._reading.discard(chosen)

    def _choose(self, step: int | None) -> bytes:
        steps = self.steps()
        if step is None:
            return msgspec.json.encode(steps[-1] if steps else None)
        if step not in steps:
            raise CheckpointNotFound(
                f"step {step!r} is not committed in {self.url}; committed are {steps[-8:] if steps else 'none'}",
                step=step,
                steps=steps,
            )
        return msgspec.json.encode(step)

    def _prune(self, newest: int) -> None:
        """Remove expired steps, on rank 0. The save is durable by now, so a failure here is only logged."""
        if self._coordinator.rank != 0 or self._retention.keep_last is None:
            return
        try:
            self._root.prune(self._root.plan_prune(self._retention, protected={newest, *self._reading}))
        except StoreError as error:
            logger.warning("could not prune %s after step %d was saved: %s", self.url, newest, error)

    def _require_open(self) -> None:
        if self._closed:
            raise CheckpointerClosed(f"the Checkpointer of {self.url} is closed; make a new one", url=self.url)

    def close(self) -> None:
        """Let go of the other ranks. Collective; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._coordinator.close()

    def __enter__(self) -> Checkpointer:
        self._require_open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()
