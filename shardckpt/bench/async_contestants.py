# SPDX-License-Identifier: Apache-2.0
"""Who saves while training goes on: what a contestant has to offer, nobody, and the engine in each of its modes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from .. import Checkpointer, Options, SaveHandle
from .training import Training

NOBODY, ENGINE, PEER = "no-checkpoints", "shardckpt", "dcp"
Copies = Literal["in the call", "later", "never"]


class Flight(ABC):
    """A save that is under way."""

    def before_update(self) -> None:
        """Wait, as the contestant's users have to, before the optimizer changes the state."""
        return

    def hooks(self) -> float:
        """Seconds that training was held since the call by what the contestant itself has put into it."""
        return 0.0

    @abstractmethod
    def wait(self) -> None:
        """Return when the save is durable; raises its error. Called from a thread of its own."""


class Saver(ABC):
    """Saves the state of a training run, on all ranks; opened for one turn, in a folder of its own."""

    @abstractmethod
    def save(self, number: int) -> Flight:
        """Begin to save; what this takes is a stall."""

    @abstractmethod
    def load(self, number: int) -> None:
        """Load a checkpoint into the run."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything. Collective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrant(ABC):
    """A contestant: how it saves, ready to be opened."""

    name: str
    """Name in reports."""

    @property
    @abstractmethod
    def how(self) -> str:
        """What a user would write."""

    @property
    def side(self) -> str:
        """``no-checkpoints``, ``shardckpt`` or ``dcp``."""
        return NOBODY

    @property
    def copies(self) -> Copies:
        """When the state is copied: in the call, while training goes on, or never; of blocking saves, never."""
        return "never"

    @property
    def blocking(self) -> bool:
        """Whether the call returns when the save is durable."""
        return False

    @abstractmethod
    def open(self, folder: str, training: Training) -> Saver:
        """Take a turn with files in ``folder``. Collective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nobody(Entrant):
    """Training without checkpoints: what noise looks like."""

    name: str = NOBODY

    @property
    def how(self) -> str:
        return "nothing is saved"

    def open(self, folder: str, training: Training) -> Saver:
        return _NobodySaver()


class _NobodySaver(Saver):
    def save(self, number: int) -> Flight:
        return Done()

    def load(self, number: int) -> None:
        raise FileNotFoundError(number)

    def close(self) -> None:
        return


class Done(Flight):
    """A save that was over when the call returned."""

    def wait(self) -> None:
        return


# ---- the engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine(Entrant):
    """shardckpt in one of its modes."""

    options: Options
    """What the user chooses."""
    wait: bool = False
    """Whether saves are blocking ones."""

    @property
    def how(self) -> str:
        chosen = f"stage={self.options.stage!r}, background={self.options.background!r}"
        return "save(..., wait=True)" if self.wait else f"save(...) with {chosen}"

    @property
    def side(self) -> str:
        return ENGINE

    @property
    def copies(self) -> Copies:
        if self.wait or self.options.stage == "none":
            return "never"
        return "in the call" if self.options.stage == "eager" else "later"

    @property
    def blocking(self) -> bool:
        return self.wait

    def open(self, folder: str, training: Training) -> Saver:
        return _EngineSaver(folder, training, self)


class _EngineSaver(Saver):
    def __init__(self, folder: str, training: Training, entrant: Engine) -> None:
        self._training = training
        self._entrant = entrant
        self._checkpointer = Checkpointer(folder, options=entrant.options)

    def save(self, number: int) -> Flight:
        handle = self._checkpointer.save(number, self._training.state, wait=self._entrant.wait)
        return _EngineFlight(handle, promised=self._entrant.options.stage == "none" and not self._entrant.wait)

    def load(self, number: int) -> None:
        self._checkpointer.restore(self._training.state, step=number)

    def close(self) -> None:
        self._checkpointer.close()


class _EngineFlight(Flight):
    def __init__(self, handle: SaveHandle, *, promised: bool) -> None:
        self._handle = handle
        self._promised = promised
        self._call = handle.stall

    def before_update(self) -> None:
        if self._promised:
            self._handle.wait_staged()

    def hooks(self) -> float:
        return self._handle.stall - self._call

    def wait(self) -> None:
        self._handle.result()
