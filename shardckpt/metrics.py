# SPDX-License-Identifier: Apache-2.0
"""What a save spent its time on, as the manifest has it: a column per phase, with one number of microseconds for each rank.

Bytes follow from the plan. The manifest is written during ``receipts``, so it has of that phase what rank 0 waited for the
others, and nothing of ``commit``.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from .errors import InvalidManifest
from .events import PHASES, Phase
from .manifest import MetricsRecord
from .records import require

RECORDED: tuple[Phase, ...] = PHASES[: PHASES.index("commit")]
"""The phases that a manifest tells of."""
_ON_RANK_0: Phase = "receipts"
_LIMIT = (1 << 32) - 1


def encode_columns(seconds: Sequence[Mapping[Phase, float]]) -> MetricsRecord | None:
    """The record of seconds by phase of each rank, in order of ranks; None when there are none.

    A phase that a rank was never at counts 0; more than 71 minutes, which is what four bytes hold, count as that.
    """
    columns: dict[Phase, str] = {}
    for phase in RECORDED:
        found = [of_rank.get(phase) for of_rank in (seconds[:1] if phase == _ON_RANK_0 else seconds)]
        if any(of_rank is not None for of_rank in found):
            microseconds = np.rint(np.array([of_rank or 0.0 for of_rank in found]) * 1e6).clip(0, _LIMIT)
            columns[phase] = base64.b64encode(microseconds.astype(">u4").tobytes()).decode("ascii")
    return MetricsRecord(columns) if columns else None


def decode_columns(record: MetricsRecord, world_size: int) -> dict[Phase, npt.NDArray[np.float64]]:
    """Seconds by rank, for each recorded phase in order; of ``receipts`` for rank 0 only.

    Raises `InvalidManifest` when a column is not base64 of one big-endian four-byte number for each rank.
    """
    require(bool(record.microseconds), "metrics", "without any phase")
    strange = sorted(record.microseconds.keys() - RECORDED)
    require(not strange, "metrics", f"of phases that manifests do not have: {strange}")
    return {
        phase: _decode(record.microseconds[phase], phase, 1 if phase == _ON_RANK_0 else world_size)
        for phase in RECORDED
        if phase in record.microseconds
    }


def _decode(text: str, phase: Phase, count: int) -> npt.NDArray[np.float64]:
    where = f"metrics of {phase!r}"
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidManifest(f"invalid manifest: {where}: not base64: {error}", where=where) from None
    require(len(data) == 4 * count, where, f"{len(data)} bytes where {4 * count} are needed, 4 for each of {count} ranks")
    require(base64.b64encode(data).decode("ascii") == text, where, "base64 with bits that mean nothing")
    return np.frombuffer(data, dtype=">u4").astype(np.float64) / 1e6
