# SPDX-License-Identifier: Apache-2.0
"""`CheckpointEngine`: what somebody implements who keeps checkpoints in a way of his own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..loading import Restored


class CheckpointEngine(ABC):
    """Saves and loads the states of one training run, by step, in one root. Not needed beside a `Checkpointer`, which is all
    this and more; it is for programs that leave the choice of how to save to a name (`get_checkpoint_engine`).

    Each rank of the default process group makes one, with the same root; a single process needs no process group. All ranks
    call the same methods in the same order, each from one thread at a time, but for `steps`, which any rank calls as it likes.
    A checkpoint is made so::

        engine.create(step)
        engine.save({"model": model, "optimizer": optimizer})   # once, or once for each part
        engine.commit()
        ...                                                     # training goes on
        engine.wait()                                           # now the step is durable

    Of a step that was not committed nothing is ever seen by `steps` or `load`, whatever died and whenever. All errors are
    `CheckpointError`, and an error on one rank is raised on all.
    """

    @abstractmethod
    def create(self, step: int, metadata: Mapping[str, Any] | None = None) -> None:
        """Begin the checkpoint of ``step``, with a mapping of JSON values to be kept with it. What was created before and not
        committed is dropped.

        Raises `ConfigError` for what is no step number or no metadata, and `CheckpointerClosed` after `cleanup`. A step that
        is committed already is never overwritten: here or in a later call, `wait` at the latest, `AlreadyCommitted` is raised.
        """

    @abstractmethod
    def save(self, state: Mapping[str, Any]) -> None:
        """Add this rank's part of ``state`` to the checkpoint that was created. The state must not change before `commit` has
        returned: the engine may read it at any time until then.

        A state is what `Checkpointer.save` takes. Raises `ConfigError` without `create`, `DuplicateName` for a top-level key
        that was added before, and, here or in `commit`, `StateError` for what cannot be saved.
        """

    @abstractmethod
    def commit(self) -> None:
        """Make what was saved the checkpoint of its step; return when the state may be changed. The engine may go on in the
        background, and waits here for the commit before this one, or raises its error.

        Raises `ConfigError` when nothing was created or nothing was saved.
        """

    @abstractmethod
    def wait(self) -> None:
        """Return when what was committed last is durable, so that a power cut cannot undo it; at once when there is nothing to
        wait for. Raises the error that made it fail."""

    @abstractmethod
    def steps(self) -> list[int]:
        """The steps that are committed, ascending, as this rank sees them now."""

    @abstractmethod
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
        """Load ``step``, or the newest one, into ``state`` in place; None when nothing is committed. Waits for a commit that is
        under way.

        The arguments are those of `Checkpointer.restore`; an engine that cannot do one of them raises `ConfigError` when it is
        asked for. A step that is not committed raises `CheckpointNotFound`, one that is damaged `IntegrityError`.
        """

    @abstractmethod
    def cleanup(self) -> None:
        """Wait for the commit that is under way, drop what was created and not committed, and let go of everything. A second
        call does nothing; after it `create`, `save`, `commit` and `load` raise `CheckpointerClosed`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            self.cleanup()
        except CheckpointError:
            # it must not hide the error that ends the block
            if error is None:
                raise
