# SPDX-License-Identifier: Apache-2.0
"""States at random: any mix of layouts, dtypes and shapes on real ranks, loaded as any other mix."""

from __future__ import annotations

import random
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import shardckpt
from shardckpt.options import Options
from tests.engine.simulate import random_tensor, same_bits
from tests.ranks import RankPool

DTYPES = ["float32", "bfloat16", "int8", "int64", "bool", "complex64", "complex128", "float8_e4m3fn", "uint16"]
SIZES = [0, 1, 2, 3, 5, 8, 13, 40, 128]
MESHES: dict[int, list[tuple[int, ...]]] = {
    1: [(1,)],
    2: [(2,), (1, 2)],
    3: [(3,), (3, 1)],
    4: [(4,), (2, 2)],
    6: [(6,), (2, 3), (3, 2)],
    8: [(8,), (2, 4), (2, 2, 2)],
}


def wholes(seed: int) -> dict[str, torch.Tensor]:
    """Tensors by name; the last ones cross blocks."""
    draw = random.Random(seed)
    made = {}
    for number in range(12):
        shape = tuple(draw.choice(SIZES) for _ in range(draw.randint(0, 3)))
        made[f"t{number}"] = random_tensor(draw.choice(DTYPES), shape, seed * 100 + number)
    made["rows"] = random_tensor("float32", (draw.randint(300, 500), 257), seed)
    made["columns"] = random_tensor("int16", (257, draw.randint(700, 900)), seed)
    return made


def local_part(whole: torch.Tensor, mesh: DeviceMesh, placements: list[Any]) -> torch.Tensor:
    """What this rank holds, as torch splits it."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    bits = whole.view(torch.int8 if whole.element_size() == 1 else whole.dtype)
    for placement, size, index in zip(placements, mesh.shape, coordinate, strict=True):
        if not isinstance(placement, Replicate):
            bits = placement._split_tensor(bits, size, with_padding=False)[0][index]
    return bits.contiguous().view(whole.dtype)


def spread(draw: random.Random, whole: torch.Tensor, meshes: list[DeviceMesh], *, filled: bool) -> tuple[Any, torch.Tensor]:
    """A leaf that stands for ``whole`` in some layout, and what this rank's part of it has to be."""
    kind = draw.choice(["plain", "strides", "mesh", "mesh", "mesh", "flat"])
    rank, size = dist.get_rank(), dist.get_world_size()
    if kind == "mesh":
        mesh = draw.choice(meshes)
        placements: list[Any] = []
        for _ in range(mesh.ndim):
            dim = draw.randrange(max(1, whole.dim()))
            choices: list[Any] = [Replicate()]
            if whole.dim():
                choices += [Shard(dim), Shard(dim), _StridedShard(dim, split_factor=draw.choice([2, 3]))]
            placements.append(draw.choice(choices))
        part = local_part(whole, mesh, placements)
        local = part.clone() if filled else torch.zeros_like(part)
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()), part
    if kind == "flat":
        cuts = sorted(draw.randint(0, whole.numel()) for _ in range(size - 1))
        start, stop = ([0, *cuts, whole.numel()][at] for at in (rank, rank + 1))
        part = whole.reshape(-1)[start:stop]
        local = part.clone() if filled else torch.zeros_like(part)
        return shardckpt.Flat(local, tuple(whole.shape), start), part
    leaf = whole.clone() if filled else torch.zeros_like(whole)
    if kind == "strides" and whole.dim() == 2:
        leaf = leaf.t().contiguous().t()
    return leaf, whole


def build(seed: int, layout_seed: int, *, filled: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A state with each whole tensor in some layout, and the parts of this rank."""
    size = dist.get_world_size()
    meshes = [init_device_mesh("cpu", shape) for shape in MESHES[size]]
    draw = random.Random(layout_seed)
    state, parts = {}, {}
    for name, whole in wholes(seed).items():
        state[name], parts[name] = spread(draw, whole, meshes, filled=filled)
    return state, parts


def local_of(leaf: Any) -> torch.Tensor:
    if isinstance(leaf, shardckpt.Flat):
        return leaf.data
    return leaf.to_local() if isinstance(leaf, DTensor) else leaf


def save_random(root: str, seed: int) -> None:
    state, _ = build(seed, seed + 1, filled=True)
    own = torch.full((dist.get_rank() + 1,), dist.get_rank())
    shardckpt.save(root, {"tensors": state, "own": shardckpt.PerRank({"t": own, "v": dist.get_rank()})})


def load_random(root: str, seed: int, layout_seed: int, read_once: str) -> list[str]:
    """Names of tensors that are not what they should be."""
    state, parts = build(seed, layout_seed, filled=False)
    shardckpt.load(root, into={"tensors": state}, options=Options(read_once=read_once))  # type: ignore[arg-type]
    return [name for name, leaf in state.items() if not same_bits(local_of(leaf), parts[name])]


def check(ranks: RankPool, root: Path, seed: int) -> None:
    draw = random.Random(seed)
    worlds = list(MESHES)
    ranks.run(draw.choice(worlds), save_random, str(root), seed)
    for number, read_once in enumerate(["always", "never"]):
        wrong = ranks.run(draw.choice(worlds), load_random, str(root), seed, seed + 1000 * (number + 1), read_once)
        assert not any(wrong), wrong
    loaded = shardckpt.load(root).state
    for name, whole in wholes(seed).items():
        assert same_bits(loaded["tensors"][name], whole), name
    assert {rank: len(own) for rank, own in loaded["own"]["t"].items()} == {rank: rank + 1 for rank in loaded["own"]["v"]}


def test_meshes_are_of_all_ranks() -> None:
    assert all(prod(shape) == size for size, shapes in MESHES.items() for shape in shapes)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_random_states(ranks: RankPool, tmp_path: Path, seed: int) -> None:
    check(ranks, tmp_path / "c", seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 60))
def test_many_random_states(ranks: RankPool, tmp_path: Path, seed: int) -> None:
    check(ranks, tmp_path / "c", seed)
