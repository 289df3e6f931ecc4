# SPDX-License-Identifier: Apache-2.0
"""A checkpoint in memory, put together by brute force: what capture and targets are tested against without the engine."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shardckpt.adapters.dtypes import dtype_name, dtype_named
from shardckpt.layout import MeshLayout, PerRankLayout, PerRankShapes, Piece, Replicated
from shardckpt.layout.mesh import Mesh, Replicate
from shardckpt.state import Captured, StoredIndex, StoredTensor, Target, Whereabouts, capture, open_target
from shardckpt.values import decode_value, encode_value


def through_json(value: Any) -> Any:
    """``value`` encoded to JSON text and decoded again."""
    return decode_value(json.loads(json.dumps(encode_value(value))))


@dataclass
class Memory:
    """What all ranks captured."""

    world_size: int
    whole: dict[str, torch.Tensor] = field(default_factory=dict)
    """Whole tensors by name."""
    own: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    """Per-rank tensors by name and rank."""
    own_values: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    containers: dict[str, Any] = field(default_factory=dict)

    def index(self, rank: int = 0) -> StoredIndex:
        """What a loading rank is told."""
        own = self.own_values[rank] if rank < self.world_size else {}
        return StoredIndex(self.world_size, self.tensors, self.aliases, self.values, own, self.containers)

    def fill(self, target: Target, rank: int = 0) -> None:
        """Fill what ``target`` wants."""
        for wanted in target.wanted:
            if wanted.source_rank is not None:
                source = self.own[wanted.name, wanted.source_rank]
            else:
                piece = wanted.layout.piece(rank)
                assert piece is not None
                assert tuple(self.whole[wanted.name].shape) == tuple(wanted.layout.shape), wanted.name
                source = take(self.whole[wanted.name], piece)
            assert source.dtype == wanted.data.dtype, (wanted.name, source.dtype, wanted.data.dtype)
            assert source.shape == wanted.data.shape, wanted.name
            with torch.no_grad():
                wanted.data.copy_(source)


def take(whole: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The elements of ``piece``, in its shape."""
    local = torch.empty(piece.numel, dtype=whole.dtype)
    for part in piece.fragments:
        box = whole[tuple(slice(o, o + n) for o, n in zip(part.offsets, part.sizes, strict=True))]
        local.as_strided(part.sizes, piece.grid_strides, part.position).copy_(box)
    return local.view(piece.shape)


def put(whole: torch.Tensor, piece: Piece, local: torch.Tensor) -> None:
    """The inverse of `take`."""
    flat = local.detach().cpu().contiguous().view(-1)
    for part in piece.fragments:
        box = whole[tuple(slice(o, o + n) for o, n in zip(part.offsets, part.sizes, strict=True))]
        box.copy_(flat.as_strided(part.sizes, piece.grid_strides, part.position))


def gather(captured: Sequence[Captured]) -> Memory:
    """Put together what the ranks captured; fails when replicas or values differ, or elements are held by no rank."""
    memory = Memory(len(captured))
    covered: dict[str, torch.Tensor] = {}
    for rank, one in enumerate(captured):
        memory.own_values.append({name: through_json(value) for name, value in one.per_rank_values.items()})
        for name, value in one.values.items():
            assert memory.values.setdefault(name, through_json(value)) == value or value != value, name
        for name, container in one.containers.items():
            assert memory.containers.setdefault(name, through_json(container)) == container
        for tensor in one.tensors:
            if tensor.alias_of is not None:
                assert memory.aliases.setdefault(tensor.name, tensor.alias_of) == tensor.alias_of
                continue
            dtype = dtype_name(tensor.data.dtype)
            if isinstance(tensor.layout, PerRankLayout):
                memory.own[tensor.name, rank] = tensor.data.detach().clone()
                continue
            layout = tensor.layout
            if isinstance(layout, Replicated):
                layout = MeshLayout(layout.shape, Mesh((0,), (1,)), (Replicate(),))
            memory.tensors.setdefault(tensor.name, StoredTensor(dtype, layout))
            whole = memory.whole.setdefault(tensor.name, torch.zeros(layout.shape, dtype=tensor.data.dtype))
            mask = covered.setdefault(tensor.name, torch.zeros(layout.shape, dtype=torch.bool))
            piece = tensor.layout.piece(rank)
            assert piece is not None
            held = take(mask, piece)
            same = take(whole, piece)[held].view(-1), tensor.data.detach().cpu()[held].view(-1)
            assert bits(same[0]) == bits(same[1]), f"{tensor.name} differs between replicas"
            put(whole, piece, tensor.data)
            put(mask, piece, torch.ones(piece.shape, dtype=torch.bool))
    for name, mask in covered.items():
        assert bool(mask.all()), f"{name} is not covered"
    for name, _ in memory.own:
        shapes = tuple(
            tuple(memory.own[name, rank].shape) if (name, rank) in memory.own else None for rank in range(memory.world_size)
        )
        kind = next(tensor.dtype for (other, _), tensor in memory.own.items() if other == name)
        memory.tensors[name] = StoredTensor(dtype_name(kind), PerRankShapes(shapes))
    assert all(dtype_named(tensor.dtype) is not None for tensor in memory.tensors.values())
    return memory


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def save(state: Mapping[str, Any], here: Whereabouts | None = None) -> Memory:
    """A checkpoint of one process."""
    return gather([copy.copy(capture(state, here))])


def load(
    memory: Memory,
    state: Mapping[str, Any],
    here: Whereabouts | None = None,
    select: Callable[[str], bool] = lambda name: True,
) -> Target:
    """Load into ``state``; the target, finished."""
    here = here or Whereabouts.here()
    target = open_target(state, memory.index(here.rank), select=select, here=here)
    memory.fill(target, here.rank)
    target.finish()
    return target
