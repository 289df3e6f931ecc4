# SPDX-License-Identifier: Apache-2.0
"""Mesh layouts against the code that torch's DTensor itself uses, for meshes of up to 16 ranks and no process group."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate as DReplicate
from torch.distributed.tensor import Shard as DShard

from shardckpt.describe import convert_placement
from shardckpt.layout import Ints, Mesh, MeshLayout, Placement, Replicate, Shard, StridedShard
from tests.layout import brute
from tests.layout.strategies import mesh_layouts

try:
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
    from torch.distributed.tensor.placement_types import _StridedShard, _StridedShardOffsetMode
except ImportError as error:
    pytest.skip(f"torch {torch.__version__} has other internal functions: {error}", allow_module_level=True)


def as_torch(placement: Placement) -> DReplicate | DShard | _StridedShard:
    match placement:
        case Replicate():
            return DReplicate()
        case Shard(dim):
            return DShard(dim)
        case StridedShard(dim, factor):
            return _StridedShard(dim, split_factor=factor)


def torch_local(layout: MeshLayout, at: Ints) -> torch.Tensor:
    """The local tensor of element numbers that torch's splitting gives the rank at coordinate ``at``."""
    tensor = torch.arange(prod(layout.shape)).view(layout.shape)
    for placement, size, index in zip(layout.placements, layout.mesh.shape, at, strict=True):
        split = as_torch(placement)
        if not isinstance(split, DReplicate):
            tensor = split._split_tensor(tensor, size, with_padding=False)[0][index]
    return tensor


@given(mesh_layouts())
def test_elements_are_those_of_torch(layout: MeshLayout) -> None:
    for rank, at in zip(layout.mesh.ranks, product(*map(range, layout.mesh.shape)), strict=True):
        piece = layout.piece(rank)
        expected = torch_local(layout, at)
        assert piece is not None
        assert brute.held(piece, layout.shape).tolist() == expected.flatten().tolist()
        if expected.numel():
            assert piece.shape == tuple(expected.shape)


@given(mesh_layouts())
def test_local_shapes_and_offsets_are_those_of_torch(layout: MeshLayout) -> None:
    sharded = [layout.shape[p.dim] for p in layout.placements if not isinstance(p, Replicate)]
    # torch indexes with a list of no offsets when a dimension without elements is sharded again
    assume(all(sharded))
    placements = [as_torch(placement) for placement in layout.placements]
    for rank, at in zip(layout.mesh.ranks, product(*map(range, layout.mesh.shape)), strict=True):
        piece = layout.piece(rank)
        assert piece is not None
        try:
            shape, offset = _compute_local_shape_and_global_offset(layout.shape, layout.mesh.shape, list(at), placements)
        except IndexError:
            # torch cannot shard an empty shard once more; what it holds is compared in the test above
            assert piece.numel == 0
            continue
        assert piece.grid_shape == shape
        if piece.numel:
            assert tuple(dim[0][0] for dim in piece.grid) == offset


@given(st.integers(0, 40), st.integers(1, 8), st.integers(2, 8))
def test_strided_offset_lists_are_those_of_torch(size: int, ranks: int, factor: int) -> None:
    layout = MeshLayout((size,), Mesh(tuple(range(ranks)), (ranks,)), (StridedShard(0, factor),))
    for rank in range(ranks):
        piece = layout.piece(rank)
        length, offsets = _StridedShard(0, split_factor=factor).local_shard_size_and_offset(
            size, ranks, rank, offset_mode=_StridedShardOffsetMode.ALL
        )
        assert piece is not None
        assert piece.numel == length
        assert brute.held(piece, (size,)).tolist() == offsets


@pytest.mark.parametrize("placement", [Replicate(), Shard(0), Shard(3), StridedShard(1, 4)])
def test_placements_are_converted(placement: Placement) -> None:
    assert convert_placement(as_torch(placement), "x") == placement


def test_a_strided_shard_of_one_part_is_a_plain_one() -> None:
    assert convert_placement(_StridedShard(1, split_factor=1), "x") == Shard(1)


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 4))
def test_fsdp_over_tensor_parallelism(size: int, data_parallel: int, tensor_parallel: int) -> None:
    """fully_shard cuts what tensor parallelism has left: the strided placement has to say the same."""
    assume(size % (data_parallel * tensor_parallel) == 0)
    layout = MeshLayout(
        (size,),
        Mesh(tuple(range(data_parallel * tensor_parallel)), (data_parallel, tensor_parallel)),
        (StridedShard(0, tensor_parallel) if tensor_parallel > 1 else Shard(0), Shard(0)),
    )
    for dp, tp in product(range(data_parallel), range(tensor_parallel)):
        of_tp = torch.arange(size).chunk(tensor_parallel)[tp]
        piece = layout.piece(dp * tensor_parallel + tp)
        assert piece is not None
        assert brute.held(piece, (size,)).tolist() == of_tp.chunk(data_parallel)[dp].tolist()
