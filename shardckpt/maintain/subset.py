# SPDX-License-Identifier: Apache-2.0
"""Which part of the data of a checkpoint is read when not all of it is to be: a random share, or one of several equal parts."""

from __future__ import annotations

import random
import re
from collections.abc import Container
from dataclasses import dataclass
from math import ceil

from shardckpt.errors import ConfigError
from shardckpt.plan import Plan
from shardckpt.reshard import Extent

_PART = re.compile(r"(\d{1,9})/(\d{1,9})", re.ASCII)
_SHARE = re.compile(r"(\d{1,3}(?:\.\d{1,9})?)%", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subset:
    """Some of the chunks of each checkpoint."""

    part: tuple[int, int] | None = None
    """(n, t): every t-th chunk. Together, the parts 1/t, 2/t, ... t/t have every chunk once."""
    share: float = 1.0
    """Without a part: as many random chunks as make this share, at least one."""
    seed: int = 0
    """Two subsets with the same seed and share are equal."""

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> Subset:
        """From ``5%`` or ``2/10``; raises `ConfigError` for anything else."""
        part, share = _PART.fullmatch(text), _SHARE.fullmatch(text)
        if part is not None and 1 <= int(part[1]) <= int(part[2]):
            return cls(part=(int(part[1]), int(part[2])))
        if share is not None and 0 < float(share[1]) <= 100:
            return cls(share=float(share[1]) / 100, seed=seed)
        raise ConfigError(
            f"{text!r} is no part of the data: give a share above 0% and up to 100%, such as 5%, or one of several parts, such "
            "as 2/10; the parts 1/10 to 10/10 are all of it"
        )

    def choose(self, count: int, attempt: str) -> Container[int]:
        """Which of ``count`` chunks of the checkpoint of an attempt are read.

        The parts of small checkpoints begin at different chunks, so that one run does not read all of them and the next none.
        """
        if self.part is not None:
            number, parts = self.part
            return range((number - 1 - int(attempt, 16)) % parts, count, parts)
        generator = random.Random(f"{self.seed}-{attempt}")
        return frozenset(generator.sample(range(count), min(count, ceil(count * self.share))))


EVERYTHING = Subset(part=(1, 1))
"""All of the data."""


class Portion:
    """What is read of one checkpoint, in chunks of ``size`` bytes."""

    def __init__(self, plan: Plan, attempt: str, subset: Subset, size: int) -> None:
        self._sizes = [int(nbytes) for nbytes in plan.bytes_by_rank]
        self._size = size
        self._first = [0]
        for nbytes in self._sizes:
            self._first.append(self._first[-1] + -(-nbytes // size))
        self._chosen = subset.choose(self._first[-1], attempt)

    def chunks(self, rank: int) -> list[Extent]:
        """Ranges of bytes of the data region of a rank's file, in order."""
        nbytes, size, first = self._sizes[rank], self._size, self._first[rank]
        starts = (at * size for at in range(-(-nbytes // size)) if first + at in self._chosen)
        return [(start, min(start + size, nbytes)) for start in starts]

    @property
    def nbytes(self) -> int:
        """Length of all chunks together."""
        return sum(stop - start for rank in range(len(self._sizes)) for start, stop in self.chunks(rank))
