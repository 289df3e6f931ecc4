# SPDX-License-Identifier: Apache-2.0
"""What a save spent its time on, by phase and rank, and which ranks held it up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardckpt.events import Phase
from shardckpt.metrics import decode_columns

from .stored import StoredCheckpoint

_MOVING: tuple[Phase, ...] = ("stage", "hash", "write", "readback")


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTimes:
    """One phase of a save."""

    phase: Phase
    """What was done."""
    seconds: tuple[float, ...]
    """Wall time by rank; of ``receipts`` on rank 0 only."""
    bytes: tuple[int, ...] | None
    """Bytes that went through it, by rank; None where that means nothing."""
    slowest: int
    """The rank that took longest."""

    def speed(self, rank: int) -> float | None:
        """GB/s on a rank; None where bytes mean nothing, or too little time was measured."""
        if self.bytes is None or not self.seconds[rank] or not self.bytes[rank]:
            return None
        return self.bytes[rank] / 1e9 / self.seconds[rank]


def list_timings(stored: StoredCheckpoint) -> list[PhaseTimes]:
    """The phases of the save, in order; none when the manifest does not tell."""
    manifest = stored.checkpoint.manifest
    if manifest.metrics is None:
        return []
    moved = tuple(stored.checkpoint.plan.bytes_by_rank.tolist())
    return [
        PhaseTimes(
            phase=phase,
            seconds=tuple(seconds.tolist()),
            bytes=moved if phase in _MOVING else None,
            slowest=int(seconds.argmax()),
        )
        for phase, seconds in decode_columns(manifest.metrics, manifest.world_size).items()
    ]


def laggards(phases: Sequence[PhaseTimes], count: int) -> list[int]:
    """The ``count`` ranks that were most behind the median in any one phase, the worst first. All ranks had these phases."""
    table = np.array([phase.seconds for phase in phases])
    behind = (table - np.median(table, axis=1, keepdims=True)).max(axis=0)
    ranks: list[int] = np.argsort(-behind, kind="stable")[:count].tolist()
    return ranks
