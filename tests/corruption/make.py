# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints, targets for them, and damage to their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import shardckpt
from shardckpt.layout import Mesh, MeshLayout, PerRankShapes, Replicate, Shard
from shardckpt.manifest import MANIFEST_NAME
from shardckpt.options import Options
from shardckpt.store import LocalStore
from tests.engine.simulate import Simulated, by_hand, save

BLOCK = 64 << 10
ONE_READER = Options(workers=1)
"""Chunks are read one after the other: in order."""


def save_tiny(path: Path) -> Simulated:
    """A checkpoint of two ranks with a tensor in two shards, one that is written in halves, one of each rank, and a value."""
    both = Mesh((0, 1), (2,))
    plan = by_hand(
        2,
        {
            "sharded": ("float32", MeshLayout((5, 3), both, (Shard(0),)), (0, 1)),
            "halves": ("int16", MeshLayout((7,), both, (Replicate(),)), (0, 2)),
            "own": ("uint8", PerRankShapes(((3,), (2,))), (0, 1)),
        },
    )
    return save(LocalStore(path), plan)


def tiny_target() -> dict[str, Any]:
    """What one process loads it into."""
    return {
        "sharded": torch.zeros(5, 3),
        "halves": torch.zeros(7, dtype=torch.int16),
        "own": shardckpt.PerRank(torch.zeros(3, dtype=torch.uint8)),
        "n": 0,
    }


def blocks_state(fill: float) -> dict[str, Any]:
    """Tensors of some blocks each, and a value: all of them tell ``fill``."""
    size = 3 * BLOCK // 8
    return {
        "first": torch.full((size,), fill, dtype=torch.float64),
        "second": torch.full((size,), fill + 0.5, dtype=torch.float64),
        "last": torch.full((5,), fill).half(),
        "step": int(fill),
    }


def holds(state: dict[str, Any], fill: float) -> bool:
    """Whether a state is all of `blocks_state` of this fill."""
    wanted = blocks_state(fill)
    same = [torch.equal(state[name], wanted[name]) for name in ("first", "second", "last")]
    return all(same) and state["step"] == wanted["step"]


def save_steps(root: Path, *steps: int) -> None:
    """A root with these steps."""
    with shardckpt.Checkpointer(root) as ckpt:
        for step in steps:
            ckpt.save(step, blocks_state(step), wait=True)


def step_path(root: Path, step: int) -> Path:
    """The directory of a step."""
    return root / f"step-{step:08d}"


def manifest_path(directory: Path) -> Path:
    """The manifest of a checkpoint."""
    return directory / MANIFEST_NAME


def rank_file(directory: Path, rank: int = 0) -> Path:
    """The file of a rank."""
    return next(directory.glob(f"rank-{rank:05d}-*.safetensors"))


def tell_refused(count: int) -> None:
    """Print how many corrupt inputs a test has tried, all of which were refused; ``pytest -s`` shows it."""
    print(f"\ncorrupt inputs refused: {count}")


def flip(path: Path, at: int, bit: int = 0) -> None:
    """Change one bit of the byte at ``at``, in place; a second time changes it back."""
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))
