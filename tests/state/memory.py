# SPDX-License-Identifier: Apache-2.0
"""A checkpoint in memory, put together by brute force: what capture and targets are tested against without the engine."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shardckpt.adapters.dtypes import as_bits, dtype_name
from shardckpt.layout import PerRankLayout, Piece
from shardckpt.state import Captured, LocalTensor, StoredIndex, StoredTensor, Target, Whereabouts, capture, open_target
from shardckpt.tables import Described, GlobalTensor, encode_table, merge_tables, per_rank_shapes
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

    def named(self) -> dict[str, bytes]:
        """The bits of all whole tensors, tied ones under each of their names."""
        whole = {name: bits(tensor) for name, tensor in self.whole.items()}
        return whole | {name: whole[canonical] for name, canonical in self.aliases.items()}

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
            _copy(wanted.data, source)


def take(whole: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The elements of ``piece``, in its shape."""
    local = torch.empty(piece.numel, dtype=whole.dtype)
    for part in piece.fragments:
        box = whole[tuple(slice(o, o + n) for o, n in zip(part.offsets, part.sizes, strict=True))]
        _copy(local.as_strided(part.sizes, piece.grid_strides, part.position), box)
    return local.view(piece.shape)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy bits: torch does not copy all dtypes."""
    with torch.no_grad():
        as_bits(target).copy_(as_bits(source))


def put(whole: torch.Tensor, piece: Piece, local: torch.Tensor) -> None:
    """The inverse of `take`."""
    flat = local.detach().cpu()
    flat = as_bits(flat).contiguous().view(local.dtype).view(-1)
    for part in piece.fragments:
        box = whole[tuple(slice(o, o + n) for o, n in zip(part.offsets, part.sizes, strict=True))]
        _copy(box, flat.as_strided(part.sizes, piece.grid_strides, part.position))


def gather(captured: Sequence[Captured]) -> Memory:
    """Put together what the ranks captured; fails when replicas or values differ, or elements are held by no rank."""
    memory = Memory(len(captured))
    for tensor in _merge(captured):
        if tensor.alias_of is not None:
            memory.aliases[tensor.name] = tensor.alias_of
        elif tensor.layout is not None:
            memory.tensors[tensor.name] = StoredTensor(tensor.dtype, tensor.layout)
    covered: dict[str, torch.Tensor] = {}
    for rank, one in enumerate(captured):
        memory.own_values.append({name: through_json(value) for name, value in one.per_rank_values.items()})
        for name, value in one.values.items():
            assert memory.values.setdefault(name, through_json(value)) == value or value != value, name
        for name, container in one.containers.items():
            assert memory.containers.setdefault(name, through_json(container)) == container
        for local in one.tensors:
            if isinstance(local.layout, PerRankLayout):
                memory.own[local.name, rank] = local.data.detach().clone()
            elif local.alias_of is None:
                _place(memory.whole, covered, local, rank)
    for name, mask in covered.items():
        assert bool(mask.all()), f"{name} is not covered"
    return memory


def _merge(captured: Sequence[Captured]) -> list[GlobalTensor]:
    """What the planner makes of the layouts."""
    described = [[Described(t.name, dtype_name(t.data.dtype), t.layout, t.alias_of) for t in one.tensors] for one in captured]
    tables = [encode_table((), one) for one in described]
    return merge_tables(tables, range(len(tables)), [per_rank_shapes(one) for one in described])


def _place(whole: dict[str, torch.Tensor], covered: dict[str, torch.Tensor], local: LocalTensor, rank: int) -> None:
    shape = local.layout.shape
    full = whole.setdefault(local.name, torch.empty(shape, dtype=local.data.dtype))
    mask = covered.setdefault(local.name, torch.zeros(shape, dtype=torch.bool))
    piece = local.layout.piece(rank)
    assert piece is not None
    held = take(mask, piece)
    here = as_bits(take(full, piece)), as_bits(local.data.detach().cpu())
    assert bits(here[0][held]) == bits(here[1][held]), f"{local.name} differs between replicas"
    put(full, piece, local.data)
    put(mask, piece, torch.ones(piece.shape, dtype=torch.bool))


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    return bytes(as_bits(tensor.detach().cpu()).contiguous().reshape(-1).view(torch.uint8).numpy())


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
