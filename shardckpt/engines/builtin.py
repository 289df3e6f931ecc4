# SPDX-License-Identifier: Apache-2.0
"""The engines that are here: each is a `Checkpointer`, and its name says how that saves."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..api import check_metadata, check_step
from ..checkpointer import Checkpointer
from ..errors import CheckpointerClosed, ConfigError, DuplicateName
from ..events import Event
from ..handle import SaveHandle
from ..loading import Restored
from ..options import Options
from ..state import check_root
from .base import CheckpointEngine

_OPTIONS: dict[str, dict[str, Any]] = {
    "sync": {},
    "async": {},
    "lazy": {"stage": "lazy"},
    "process": {"background": "process"},
}
"""What a name says of the options; the rest is up to the caller."""


def make_engine(
    name: str,
    root: str | os.PathLike[str],
    *,
    keep_last: int | None = None,
    keep_every: int | None = None,
    on_event: Callable[[Event], object] | None = None,
    options: Options | None = None,
) -> CheckpointEngine:
    """The engine of that name."""
    chosen = replace(Options.of(options), **_OPTIONS[name])
    checkpointer = Checkpointer(root, keep_last=keep_last, keep_every=keep_every, on_event=on_event, options=chosen)
    return CheckpointerEngine(checkpointer, wait=name == "sync")


@dataclass(frozen=True, slots=True)
class _Draft:
    """A checkpoint that was created and is not committed."""

    step: int
    """Number of the training step."""
    metadata: Mapping[str, Any] | None
    """What the caller wants kept with it."""
    state: dict[str, Any] = field(default_factory=dict)
    """What was saved so far."""


class CheckpointerEngine(CheckpointEngine):
    """A `Checkpointer`, which begins with a save when it is committed."""

    def __init__(self, checkpointer: Checkpointer, *, wait: bool) -> None:
        self._checkpointer = checkpointer
        self._wait = wait
        self._draft: _Draft | None = None
        self._handle: SaveHandle | None = None
        self._closed = False

    def create(self, step: int, metadata: Mapping[str, Any] | None = None) -> None:
        self._require_open()
        check_step(step)
        check_metadata(metadata)
        self._draft = _Draft(step, metadata)

    def save(self, state: Mapping[str, Any]) -> None:
        draft = self._require_draft("save")
        check_root(state)
        for key in state:
            if key in draft.state:
                raise DuplicateName(f"{key!r} of step {draft.step} was saved before; save each part once", name=key)
        draft.state.update(state)

    def commit(self) -> None:
        draft = self._require_draft("commit")
        if not draft.state:
            raise ConfigError(f"commit of step {draft.step}: there is nothing to commit; call save(state) first")
        self._draft = None
        self._handle = self._checkpointer.save(draft.step, draft.state, metadata=draft.metadata, wait=self._wait)

    def wait(self) -> None:
        if self._handle is not None:
            self._handle.result()

    def steps(self) -> list[int]:
        return self._checkpointer.steps()

    def load(
        self,
        state: Mapping[str, Any],
        *,
        step: int | None = None,
        keys: Sequence[str] | None = None,
        strict: bool = True,
        convert_dtype: bool = False,
        expect_digest: str | None = None,
        fallback: bool = False,
    ) -> Restored | None:
        return self._checkpointer.restore(
            state,
            step=step,
            keys=keys,
            strict=strict,
            convert_dtype=convert_dtype,
            expect_digest=expect_digest,
            fallback=fallback,
        )

    def cleanup(self) -> None:
        self._draft = None
        self._closed = True
        self._checkpointer.close()

    def _require_open(self) -> None:
        if self._closed:
            url = self._checkpointer.url
            raise CheckpointerClosed(f"the checkpoint engine of {url} was cleaned up; make a new one", url=url)

    def _require_draft(self, call: str) -> _Draft:
        self._require_open()
        if self._draft is None:
            raise ConfigError(f"{call}() without a checkpoint: call create(step) first")
        return self._draft
