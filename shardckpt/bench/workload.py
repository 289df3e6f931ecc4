# SPDX-License-Identifier: Apache-2.0
"""What is saved and loaded: a GPT under FSDP2's `fully_shard`, and Adam's state, on this rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from .content import count_wrong, fill, poison
from .model import build_model, state_tensors
from .shapes import GPTShape


class Workload:
    """The state of one rank, filled with content that can be checked."""

    def __init__(self, shape: GPTShape, dim: int = 0) -> None:
        """Build the model sharded over all ranks on ``dim`` (vectors always on 0), and Adam's state as if it had run."""
        self.model = build_model(shape, dim)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        for parameter in self.model.parameters():
            self.optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        for name, data, whole, offset in self._parts():
            fill(name, data, whole, offset)

    @property
    def state(self) -> dict[str, Any]:
        """What is given to the engine."""
        return {"model": self.model, "optimizer": self.optimizer}

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's part."""
        return sum(data.nbytes for _, data, _, _ in self._parts())

    @property
    def num_tensors(self) -> int:
        """Number of tensors."""
        return sum(1 for _ in self._parts())

    def poison(self) -> None:
        """Overwrite everything, so that what is right afterwards was loaded."""
        for _, data, _, _ in self._parts():
            poison(data)

    def find_wrong(self) -> list[str]:
        """Names of the tensors that do not have their content, bit for bit, each with how many elements are wrong."""
        counts = {name: count_wrong(name, data, whole, offset) for name, data, whole, offset in self._parts()}
        return [f"{name} ({count} elements)" for name, count in counts.items() if count]

    def _parts(self) -> Iterator[tuple[str, torch.Tensor, tuple[int, ...], tuple[int, ...]]]:
        """(name, local tensor, global shape, offset) of each tensor, as model and optimizer have them now."""
        for name, tensor in state_tensors(self.model, self.optimizer):
            yield name, *_locate(tensor)


def _locate(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]:
    if not isinstance(tensor, DTensor):
        return tensor, tuple(tensor.shape), (0,) * tensor.ndim
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local().detach(), tuple(tensor.shape), tuple(offset)
