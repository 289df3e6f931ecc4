# SPDX-License-Identifier: Apache-2.0
"""What a user can choose, as frozen dataclasses that refuse bad values with the reason."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from .environment import TIMEOUT_SECONDS, default_timeout
from .errors import ConfigError, told

GRACE_SECONDS = 86400.0
"""After this long without a sign of life an attempt at a save is taken for dead, unless the caller says otherwise."""
_PARITY = re.compile(r"xor:([2-9]|[1-9]\d{1,6})", re.ASCII)
_CHOICES = {
    "read_once": ("auto", "always", "never"),
    "stage": ("eager", "lazy", "none"),
    "background": ("thread", "process"),
    "when_busy": ("wait", "skip", "replace"),
    "on_error": ("warn", "raise"),
    "pin_memory": ("auto", "always", "never"),
    "on_memory_errors": ("refuse", "warn"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How saves and loads are carried out. The defaults suit a local or parallel file system."""

    timeout: float = field(default_factory=default_timeout)
    """Seconds that a rank waits for the others in one step of a save or load before it raises `RankTimeout`; 600, unless the
    environment variable ``SHARDCKPT_TIMEOUT`` says otherwise."""
    workers: int = 3
    """Threads per rank that stage, hash, write, read and verify; each has one buffer of 4 to 16 MiB."""
    read_once: Literal["auto", "always", "never"] = "auto"
    """Whether a load reads each stored block on one rank only, which passes it on to the others over the network.

    ``auto`` does so where ranks would otherwise read more than 1.05 times what they need, or where several hosts need the
    same data.
    """

    stage: Literal["eager", "lazy", "none"] = "eager"
    """When `Checkpointer.save` copies the state to host memory. No matter for blocking saves, which take no copy.

    ``eager``: before it returns. ``lazy``: what an optimizer in the state owns is copied while training goes on, and every
    optimizer step of the process waits for that; all else is copied before `save` returns. ``none``: never; the caller promises
    not to change the state before the save is durable, and the save fails where that is seen to be broken.
    """
    background: Literal["thread", "process"] = "thread"
    """What writes a staged state. A ``process`` leaves the trainer's interpreter alone, and finishes when the trainer dies."""
    host_memory_limit: int | None = None
    """Bytes of host memory per node for staged states; None takes what the ranks' files need.

    With less than that, the state is staged chunk by chunk as chunks are written: `save` then takes about as long as the write.
    """
    when_busy: Literal["wait", "skip", "replace"] = "wait"
    """What a save does that finds the last one under way: wait for it, be skipped with a warning, or take the place of one that
    no rank has finished staging (and else wait)."""
    on_error: Literal["warn", "raise"] = "warn"
    """Whether a save that storage or other ranks made fail ends training: ``warn`` logs the error, ``raise`` raises it, at the
    next call when it happened in the background. `SaveHandle.result` raises it always."""
    pin_memory: Literal["auto", "always", "never"] = "auto"
    """Whether states are staged in page-locked memory, which GPUs copy to faster: ``auto`` for states that lie on one, and
    without it where CUDA refuses; ``always`` needs a CUDA device, and fails the save where CUDA refuses."""
    parity: str | None = None
    """``xor:G``: groups of G ranks, on different hosts as far as can be, also write one parity of their files, so that any one
    lost or damaged file of a group is rebuilt during load, and on disk by ``shardckpt repair``. Takes 1/G more bytes.

    It is written in the background once the save is durable, from what is read back from storage, and the next save waits for
    it; a blocking save does so itself. A save whose parity fails stays durable.
    """
    grace: float = GRACE_SECONDS
    """Seconds, by the clock of the storage, after which a save that was not committed, and of which no file and no marker was
    written meanwhile, is dead: its files go after a commit, if there is a ``keep_last``. Longer than any save takes."""
    on_memory_errors: Literal["refuse", "warn"] = "refuse"
    """What a save does when a GPU of its state has had memory errors that ECC could not correct, so that the state may be
    damaged: raise `DeviceMemoryError` on all ranks until a good state is restored, or log a warning."""

    def __post_init__(self) -> None:
        if not _is_number_within(self.timeout, 0, 1e7):
            raise ConfigError(
                f"timeout={self.timeout!r} is not a number of seconds above 0; the default is {TIMEOUT_SECONDS:g}"
            )
        if type(self.workers) is not int or not 1 <= self.workers <= 4:
            raise ConfigError(
                f"workers={self.workers!r} is not an int from 1 to 4: each thread has a buffer of up to 16 MiB, and "
                "together they stay within 64 MiB per rank"
            )
        if not _is_number_within(self.grace, 0, 1e9):
            raise ConfigError(
                f"grace={self.grace!r} is not a number of seconds above 0; the default is {GRACE_SECONDS:g}, a day"
            )
        for name, accepted in _CHOICES.items():
            value = getattr(self, name)
            if value not in accepted:
                *others, last = map(repr, accepted)
                raise ConfigError(f"{name}={value!r} is not one of {', '.join(others)} and {last}")
        limit = self.host_memory_limit
        if limit is not None and (type(limit) is not int or limit < 1):
            raise ConfigError(f"host_memory_limit={limit!r} is not a number of bytes above 0 (or None, for no limit)")
        if self.stage == "none" and self.background == "process":
            raise ConfigError(
                "stage='none' and background='process' do not go together: another process sees only what was staged for it. "
                "Take stage='lazy', or background='thread'"
            )
        if self.parity is not None and not (isinstance(self.parity, str) and _PARITY.fullmatch(self.parity)):
            raise ConfigError(
                f"parity={self.parity!r} is not 'xor:G' with G, the number of ranks that share a parity, at least 2 (or None): "
                "'xor:4' takes a quarter more bytes, and of each 4 files one can be rebuilt"
            )

    @classmethod
    def of(cls, options: object) -> Options:
        """What an argument ``options=`` says: the defaults for None; `ConfigError` for what is no `Options`."""
        if options is None:
            return cls()
        if not isinstance(options, cls):
            raise ConfigError(f"options={told(options)} is no shardckpt.Options; write options=shardckpt.Options(stage='lazy')")
        return options

    def parity_group(self, world_size: int) -> int | None:
        """How many ranks share a parity at most, None without parity; `ConfigError` when there are not so many ranks."""
        if self.parity is None:
            return None
        size = int(self.parity.partition(":")[2])
        if world_size == 1:
            raise ConfigError(
                f"parity={self.parity!r} with one rank: there is no other file to rebuild its file from. Leave parity out"
            )
        if size > world_size:
            raise ConfigError(
                f"parity={self.parity!r} with {world_size} ranks: there are not {size} for a group. Take 'xor:{world_size}' "
                "or a smaller group"
            )
        return size


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Which committed steps a root keeps. The newest one is always kept.

    One of which a restore has failed, as it is damaged, takes no other's place: it goes when it would go in any case.
    """

    keep_last: int | None = None
    """Number of newest steps to keep; None keeps all."""
    keep_every: int | None = None
    """Steps that are multiples of this are kept for good, whatever ``keep_last`` says."""

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name}={value!r} is not an int of at least 1 (or None)")
        if self.keep_every is not None and self.keep_last is None:
            raise ConfigError("keep_every has no effect without keep_last, which says when other steps go")

    def expired(self, steps: list[int]) -> list[int]:
        """The steps of an ascending list of committed ones that are no longer kept."""
        if self.keep_last is None:
            return []
        return [s for s in steps[: -self.keep_last] if self.keep_every is None or s % self.keep_every]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When `Checkpointer.should_save` says that it is time to save."""

    every_steps: int | None = None
    """At steps that are multiples of this."""
    every_seconds: float | None = None
    """This many seconds after the last save began (or `should_save` was first called), by the clock of rank 0."""
    continuous: bool = False
    """As soon as the last save is durable; the first at once. After saves that failed, with pauses of 1 s, 2 s, ... 5 min."""
    max_overhead: float | None = None
    """The share of the time that saves may cost, 0.02 for two per cent; the first at once.

    The next one is due when what the last one cost, which is measured, is this share of the time since it began: what it kept
    training waiting, and what training went slower while it was under way.
    """

    def __post_init__(self) -> None:
        if self.every_steps is not None and (type(self.every_steps) is not int or self.every_steps < 1):
            raise ConfigError(f"every_steps={self.every_steps!r} is not an int of at least 1 (or None)")
        if self.every_seconds is not None and not _is_number_within(self.every_seconds, 0, 1e9):
            raise ConfigError(f"every_seconds={self.every_seconds!r} is not a number of seconds above 0 (or None)")
        if type(self.continuous) is not bool:
            raise ConfigError(f"continuous={self.continuous!r} is not True or False")
        if self.max_overhead is not None and not _is_number_within(self.max_overhead, 0, 1):
            raise ConfigError(
                f"max_overhead={self.max_overhead!r} is not a share between 0 and 1 (or None); 0.02 lets saves take two per "
                "cent of the time"
            )
        clocks = [name for name in ("every_seconds", "continuous", "max_overhead") if getattr(self, name) not in (None, False)]
        if len(clocks) > 1:
            raise ConfigError(
                f"{' and '.join(clocks)} do not go together: each says by itself when the next save is due. Keep one of them; "
                "every_steps may stand beside it"
            )

    @property
    def timed(self) -> bool:
        """Whether it depends on time, so that ranks have to agree."""
        return self.continuous or self.every_seconds is not None or self.max_overhead is not None


def _is_number_within(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low < value < high
