# SPDX-License-Identifier: Apache-2.0
"""What a user can choose, as frozen dataclasses that refuse bad values with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How saves and loads are carried out. The defaults suit a local or parallel file system."""

    timeout: float = 600.0
    """Seconds that a rank waits for the others in one step of a save or load before it raises `RankTimeout`."""
    workers: int = 3
    """Threads per rank that stage, hash, write, read and verify; each has one buffer of 4 to 16 MiB."""
    read_once: Literal["auto", "always", "never"] = "auto"
    """Whether a load reads each stored block on one rank only, which passes it on to the others over the network.

    ``auto`` does so where ranks would otherwise read more than 1.05 times what they need, or where several hosts need the
    same data.
    """

    def __post_init__(self) -> None:
        if not isinstance(self.timeout, int | float) or not 0 < self.timeout < 1e7:
            raise ConfigError(f"timeout={self.timeout!r} is not a number of seconds above 0; the default is 600")
        if type(self.workers) is not int or not 1 <= self.workers <= 4:
            raise ConfigError(
                f"workers={self.workers!r} is not an int from 1 to 4: each thread has a buffer of up to 16 MiB, and "
                "together they stay within 64 MiB per rank"
            )
        if self.read_once not in ("auto", "always", "never"):
            raise ConfigError(f"read_once={self.read_once!r} is not one of 'auto', 'always' and 'never'")


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Which committed steps a root keeps. The newest one is always kept."""

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
