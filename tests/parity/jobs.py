# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with parity, saved by real ranks of unequal sizes; and what they hold."""

from __future__ import annotations

import logging
import unittest
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import shardckpt
from shardckpt.maintain.stored import StoredCheckpoint, open_checkpoint
from shardckpt.parity.record import Parity, find_parity
from shardckpt.store import open_store

SIZES = [70_000, 3, 200_001, 33_333, 140_000, 65_536, 1, 90_001]
"""Elements that each rank has of its own: from one block of 64 KiB to several, with ends of all kinds."""


def own_part(rank: int, step: int) -> torch.Tensor:
    """What only this rank has."""
    return torch.randn(SIZES[rank], generator=torch.Generator().manual_seed(100 * step + rank))


def a_state(rank: int, step: int) -> dict[str, Any]:
    """Something that all ranks share, and something that each has for itself."""
    common = torch.arange(50_000, dtype=torch.int64) * (step + 1)
    return {"common": common, "own": shardckpt.PerRank({"part": own_part(rank, step)}), "step": step}


def save(url: str, parity: str | None, step: int = 0) -> None:
    """On each rank of a case: one blocking save, without a warning."""
    # a parity that could not be written is no error of a save
    with unittest.TestCase().assertNoLogs("shardckpt", logging.WARNING):
        shardckpt.save(url, a_state(dist.get_rank(), step), step=step, options=shardckpt.Options(parity=parity))


def load(url: str, options: dict[str, Any] | None = None) -> tuple[bool, tuple[str, ...], int]:
    """On each rank of a case: whether all is as it was saved, what was rebuilt, and how many bytes all ranks have read."""
    rank = dist.get_rank()
    common, own = torch.zeros(50_000, dtype=torch.int64), torch.zeros(SIZES[rank])
    state = {"common": common, "own": shardckpt.PerRank({"part": own}), "step": -1}
    restored = shardckpt.load(url, state, options=shardckpt.Options(**(options or {})))
    wanted = a_state(rank, restored.step)
    is_equal = torch.equal(common, wanted["common"]) and torch.equal(own, own_part(rank, restored.step))
    return is_equal and restored.state["step"] == restored.step, restored.info.rebuilt, restored.info.bytes_read


def opened(path: Path | str) -> StoredCheckpoint:
    """The checkpoint at a path."""
    return open_checkpoint(open_store(path))


def parity_of(path: Path | str) -> Parity:
    """Its parity, which has to be there."""
    stored = opened(path)
    parity = find_parity(stored.store, stored.prefix, stored.checkpoint)
    assert parity is not None
    return parity


def rank_file(path: Path, rank: int) -> Path:
    """The file of a rank."""
    return next(path.glob(f"rank-{rank:05d}-*.safetensors"))


def parity_file(path: Path, group: int, number: int) -> Path:
    """A slice of the parity of a group."""
    return next(path.glob(f"parity-{group:05d}-{number:05d}-*.xor"))


def lose(path: Path) -> None:
    """Remove a file."""
    path.unlink()


def cut(path: Path) -> None:
    """Cut the last bytes off a file."""
    path.write_bytes(path.read_bytes()[:-1])


def extend(path: Path) -> None:
    """Add a byte to a file."""
    path.write_bytes(path.read_bytes() + b"!")


def zero(path: Path) -> None:
    """Overwrite the first bytes of a file, header and all."""
    data = path.read_bytes()
    count = min(len(data), 5000)
    path.write_bytes(bytes(count) + data[count:])


def flip(path: Path, at: int = -1) -> None:
    """Change one bit of the byte at ``at``, counted from the end when negative."""
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
