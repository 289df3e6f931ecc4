# SPDX-License-Identifier: Apache-2.0
"""Compare two runs of elements: how many differ in any bit, and by how much."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from shardckpt.layout import ITEMSIZE

_STEP = 1 << 20
_WORDS: dict[int, type[np.unsignedinteger]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.uint64}
# Packs two numbers in one element, and torch converts it to nothing.
_NO_NUMBERS = "float4_e2m1fn_x2"


@dataclass(frozen=True, slots=True)
class Comparison:
    """How two tensors of one shape and dtype differ."""

    differing: int = 0
    """Elements whose bits differ: NaNs with the same bits are equal, 0.0 and -0.0 are not."""
    not_finite: int = 0
    """Those of them that are NaN or infinite on at least one side."""
    max_difference: float | None = None
    """The largest absolute difference of the others; None when there are none, or when the dtype is no floating one."""

    def __add__(self, other: Comparison) -> Comparison:
        known = [d for d in (self.max_difference, other.max_difference) if d is not None]
        return Comparison(self.differing + other.differing, self.not_finite + other.not_finite, max(known) if known else None)


def compare(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8], dtype: str) -> Comparison:
    """Compare the bytes of equally many elements of the type called ``dtype``."""
    total = Comparison()
    for at in range(0, len(a), _STEP):
        total += _compare(a[at : at + _STEP], b[at : at + _STEP], dtype)
    return total


def _compare(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8], dtype: str) -> Comparison:
    size = ITEMSIZE[dtype]
    word = _WORDS[size]
    unequal = (a.view(word) != b.view(word)).reshape(-1, max(1, size // 8)).any(axis=1)
    count = int(np.count_nonzero(unequal))
    # None: a dtype that this version of torch does not have
    kind: torch.dtype | None = getattr(torch, dtype, None)
    if not count or kind is None or not (kind.is_floating_point or kind.is_complex) or dtype == _NO_NUMBERS:
        return Comparison(count)
    # Complex numbers as pairs of real ones: torch warns of half-precision complex numbers.
    parts = 2 if kind.is_complex else 1
    real = kind.to_real()
    left, right = (torch.from_numpy(x).view(real).view(-1, parts)[torch.from_numpy(unequal)].double() for x in (a, b))
    apart = (left - right)[torch.isfinite(left).all(dim=1) & torch.isfinite(right).all(dim=1)]
    sizes = torch.hypot(apart[:, 0], apart[:, 1]) if kind.is_complex else apart[:, 0].abs()
    largest = float(sizes.max()) if len(sizes) else None
    return Comparison(count, count - len(sizes), largest)
