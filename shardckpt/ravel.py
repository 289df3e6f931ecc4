# SPDX-License-Identifier: Apache-2.0
"""Ranges of the ravel of a tensor, whatever its device and strides: pieces in rank files are such ranges."""

from __future__ import annotations

import torch

from .layout import window_boxes


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor | None:
    """The memory of a contiguous tensor as a flat tensor of bytes, without a copy; None for any other tensor."""
    if not tensor.is_contiguous():
        return None
    # not reshape(-1): the stride of a single element may be anything, and a view as bytes needs 1
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def copy_range(tensor: torch.Tensor, start: int, stop: int, target: torch.Tensor) -> None:
    """Copy elements ``[start, stop)`` of the ravel of ``tensor`` to ``target``, a flat tensor of the same dtype."""
    at = 0
    for offsets, sizes in window_boxes(tuple(tensor.shape), start, stop):
        box = tensor.detach()[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
        target[at : at + box.numel()].view(box.shape).copy_(box)
        at += box.numel()
