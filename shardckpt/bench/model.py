# SPDX-License-Identifier: Apache-2.0
"""The GPT of the benchmarks under FSDP2's `fully_shard`, and the names of all that it and Adam hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from ..errors import ConfigError
from .shapes import GPTShape

CLASSES = 256
"""At most as many different tokens come in and are told apart; what the embedding has beyond that is there for its size."""
_HEAD_WIDTH = 64


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = max(1, x.shape[2] // _HEAD_WIDTH)
        q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, 2))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + cast(Tensor, self.proj(attended.transpose(1, 2).flatten(2)))
        return x + cast(Tensor, self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    """A decoder-only transformer, whose output weights are the first rows of its token embedding."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        self.token = nn.Embedding(shape.vocabulary, shape.width)
        self.place = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(_Block(shape.width) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.token.weight[:CLASSES])


def build_model(shape: GPTShape, dim: int = 0, device: str = "cpu") -> GPT:
    """A GPT that is sharded over all ranks on ``dim`` (vectors always on 0), whose memory on ``device`` holds anything.

    Raises `ConfigError` for a ``dim`` that its matrices cannot be sharded on.
    """
    if dim not in (0, 1):
        raise ConfigError(f"dim={dim} is not 0 or 1: the largest tensors of a GPT are matrices")
    if dim == 1 and shape.width % dist.get_world_size():
        raise ConfigError(f"FSDP2 shards dimension 1 evenly only: {dist.get_world_size()} does not divide {shape.width}")
    mesh = init_device_mesh(device, (dist.get_world_size(),))

    def place(parameter: nn.Parameter) -> Shard:
        return Shard(dim if parameter.ndim > dim else 0)

    with torch.device("meta"):
        model = GPT(shape)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, shard_placement_fn=place)
    fully_shard(model, mesh=mesh, shard_placement_fn=place)
    model.to_empty(device=device)
    return model


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each parameter, and of each entry of its optimizer state, as they are now."""
    for name, parameter in model.named_parameters():
        yield name, parameter
        for key, value in optimizer.state[parameter].items():
            yield f"{name}/{key}", value
