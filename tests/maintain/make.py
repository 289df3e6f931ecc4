# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of one and the same state, saved from several world sizes and layouts; and damage to their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import shardckpt
from shardckpt.maintain.stored import StoredCheckpoint, open_checkpoint
from shardckpt.store import open_store

LAYOUTS = [(1, "plain"), (2, "rows"), (2, "flat"), (4, "columns"), (4, "grid")]
"""(world size, layout) pairs that `save_everywhere` takes."""


class Tied(nn.Module):
    """Two names for one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.embed(tokens))
        return found


def tensors() -> dict[str, torch.Tensor]:
    """Tensors of many dtypes and odd shapes, the same at each call."""
    generator = torch.Generator().manual_seed(3)
    return {
        "matrix": torch.randn(37, 11, generator=generator),
        "cube": torch.randn(5, 3, 4, generator=generator).bfloat16(),
        "wide": torch.randn(3, 1000, generator=generator, dtype=torch.float64),
        "flags": torch.rand(13, generator=generator) > 0.5,
        "waves": torch.randn(6, 2, generator=generator, dtype=torch.complex64),
        "wide/odd [name]": torch.randint(0, 9, (7,), generator=generator),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.5),
    }


def values() -> dict[str, Any]:
    """Values that are equal on all ranks."""
    return {"tokens": 7, "hyper": {"lr": 0.1, "betas": (0.9, float("inf"))}, "layers": [torch.arange(4), {"x": torch.ones(2)}]}


def state(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """All of it, as one process holds it, with entries replaced by ``changes``."""
    torch.manual_seed(0)
    return {**tensors(), **values(), "model": Tied(), "rng": shardckpt.PerRank({"seed": 5, "state": torch.arange(3)})} | (
        changes or {}
    )


def save_plain(url: Path | str, changes: dict[str, Any] | None = None, step: int = 0) -> str:
    """Save from this process; returns the URL."""
    shardckpt.save(url, state(changes), step=step)
    return str(url)


def save_spread(url: str, layout: str) -> None:
    """On each rank of a case: save the state, with its tensors spread as ``layout`` says."""
    world = dist.get_world_size()
    whole = state()
    for name, tensor in tensors().items():
        whole[name] = spread(tensor, layout)
    whole["rng"] = shardckpt.PerRank({"seed": dist.get_rank(), "state": torch.arange(3 + dist.get_rank())})
    assert world in {size for size, name in LAYOUTS if name == layout}
    shardckpt.save(url, whole)


def spread(tensor: torch.Tensor, layout: str) -> torch.Tensor | DTensor | shardckpt.Flat:
    """This rank's part of a tensor."""
    if layout == "plain":
        return tensor
    if layout == "flat":
        cut = tensor.numel() // 3
        start, stop = (0, cut) if dist.get_rank() == 0 else (cut, tensor.numel())
        return shardckpt.Flat(tensor.reshape(-1)[start:stop].clone(), tuple(tensor.shape), start)
    shape, wanted = {
        "rows": ((2,), (Shard(0),)),
        "columns": ((4,), (Shard(1),)),
        "grid": ((2, 2), (Shard(1), Shard(0))),
    }[layout]
    placements: list[Placement] = [p if isinstance(p, Shard) and p.dim < tensor.dim() else Replicate() for p in wanted]
    return distribute_tensor(tensor, init_device_mesh("cpu", shape), placements)


def train(url: str, source: str | None) -> None:
    """On each rank of a case: two steps of FSDP2 and AdamW, saved at ``url``; or what ``source`` holds, saved again."""
    torch.manual_seed(1)
    model = Tied()
    if dist.get_world_size() > 1:
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    whole = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "rng": shardckpt.RNGState(), "tokens": 0}
    if source is not None:
        shardckpt.load(source, whole)
    else:
        for _ in range(2):
            model(torch.arange(5)).sum().backward()
            optimizer.step()
            scheduler.step()
        whole["tokens"] = 10
    shardckpt.save(url, whole)


def opened(url: Path | str) -> StoredCheckpoint:
    """The checkpoint at a path."""
    return open_checkpoint(open_store(url))


def rank_file(directory: Path, rank: int = 0) -> Path:
    """The file of a rank."""
    return next(directory.glob(f"rank-{rank:05d}-*.safetensors"))


def flip(path: Path, at: int) -> None:
    """Change one bit of the byte at ``at``, counted from the end when negative."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
