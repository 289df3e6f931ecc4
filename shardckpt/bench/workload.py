# SPDX-License-Identifier: Apache-2.0
"""What is saved and loaded: a GPT under FSDP2's `fully_shard`, and Adam's state, on this rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..errors import ConfigError
from .content import count_wrong, fill, poison
from .shapes import GPTShape


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class GPT(nn.Module):
    """The parameters of a GPT; it is never run."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        self.token = nn.Embedding(shape.vocabulary, shape.width)
        self.place = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(_Block(shape.width) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)


class Workload:
    """The state of one rank, filled with content that can be checked."""

    def __init__(self, shape: GPTShape, dim: int = 0) -> None:
        """Build the model sharded over all ranks on ``dim`` (vectors always on 0), and Adam's state as if it had run."""
        self.model = _build_model(shape, dim)
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
        for name, parameter in self.model.named_parameters():
            yield name, *_locate(parameter)
            for key, value in self.optimizer.state[parameter].items():
                yield f"{name}/{key}", *_locate(value)


def _build_model(shape: GPTShape, dim: int) -> GPT:
    if dim not in (0, 1):
        raise ConfigError(f"dim={dim} is not 0 or 1: the largest tensors of a GPT are matrices")
    if dim == 1 and shape.width % dist.get_world_size():
        raise ConfigError(f"FSDP2 shards dimension 1 evenly only: {dist.get_world_size()} does not divide {shape.width}")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def place(parameter: nn.Parameter) -> Shard:
        return Shard(dim if parameter.ndim > dim else 0)

    with torch.device("meta"):
        model = GPT(shape)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, shard_placement_fn=place)
    fully_shard(model, mesh=mesh, shard_placement_fn=place)
    model.to_empty(device="cpu")
    return model


def _locate(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]:
    if not isinstance(tensor, DTensor):
        return tensor, tuple(tensor.shape), (0,) * tensor.ndim
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local().detach(), tuple(tensor.shape), tuple(offset)
