# SPDX-License-Identifier: Apache-2.0
"""The least that a snapshot can cost: one plain copy of the same number of bytes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch


def plain_copies(nbytes: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Ways to copy ``nbytes`` bytes, in one piece, from ``device`` to host memory that has been touched before, by name."""
    source = torch.full((nbytes,), 1, dtype=torch.uint8, device=device)
    target = torch.full((nbytes,), 0, dtype=torch.uint8, pin_memory=device.type == "cuda")
    if device.type == "cuda":

        def copy_from_device() -> None:
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize(device)

        return {"torch, to pinned memory": copy_from_device}
    arrays = target.numpy(), source.numpy()
    return {"torch": lambda: target.copy_(source), "numpy": lambda: np.copyto(*arrays)}
