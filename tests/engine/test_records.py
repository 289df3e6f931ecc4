# SPDX-License-Identifier: Apache-2.0
"""Layouts as records and back: exact, small, and one encoding for each."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.errors import InvalidManifest
from shardckpt.layout import (
    GlobalLayout,
    Mesh,
    MeshLayout,
    PerRankLayout,
    Placement,
    Replicate,
    Replicated,
    Shard,
    StridedShard,
)
from shardckpt.manifest import MeshRecord, TensorRecord, encode_canonical
from shardckpt.records import (
    LayoutDecoder,
    LayoutEncoder,
    affine_ranks,
    check_cover,
    checked_volume,
    decode_placement,
    encode_mesh,
    encode_placement,
)
from tests.engine.strategies import per_rank_shapes
from tests.layout.strategies import layouts, meshes, shapes


@pytest.mark.parametrize(
    ("placement", "text"),
    [
        (Replicate(), "R"),
        (Shard(0), "S0"),
        (Shard(17), "S17"),
        (StridedShard(1, 4), "S1/4"),
        (StridedShard(0, 8192), "S0/8192"),
    ],
)
def test_placements(placement: Placement, text: str) -> None:
    assert encode_placement(placement) == text
    assert decode_placement(text) == placement


@pytest.mark.parametrize(
    "text", ["", "r", "S", "S-1", "S01", "S0/", "S0/1", "S0/0", "S0/02", "S1000", "S0/1000000", "S0 ", "RR", "S٣"]
)
def test_other_placements_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a placement"):
        decode_placement(text)


@given(meshes())
def test_meshes(mesh: Mesh) -> None:
    record = encode_mesh(mesh)
    decoder = LayoutDecoder((record,), (), max(mesh.ranks) + 1)
    assert decoder._meshes == [mesh]
    if mesh.ranks == tuple(range(len(mesh.ranks))):
        assert record.ranks is None


@pytest.mark.parametrize(
    ("ranks", "shape"),
    [
        pytest.param(tuple(range(1 << 14)), (1 << 11, 8), id="16,384 ranks"),
        pytest.param(tuple(range(3, 1 << 14, 8)), (1 << 11,), id="every eighth"),
        pytest.param(tuple(row + 128 * column for row in range(128) for column in range(128)), (128, 128), id="transposed"),
    ],
)
def test_regular_meshes_are_a_few_integers(ranks: tuple[int, ...], shape: tuple[int, ...]) -> None:
    record = encode_mesh(Mesh(ranks, shape))
    assert len(encode_canonical(record)) < 60
    assert affine_ranks(record.shape, record.start, record.strides or ()) == ranks


@pytest.mark.slow
@given(st.data(), shapes())
def test_layouts_come_back_as_they_were(data: st.DataObject, shape: tuple[int, ...]) -> None:
    described: list[GlobalLayout] = [
        data.draw(st.one_of(layouts(shape, 8), per_rank_shapes(8))) for _ in range(data.draw(st.integers(1, 4)))
    ]
    encoder = LayoutEncoder()
    records = [encoder.encode("int16", layout) for layout in described]
    through = [msgspec.json.decode(encode_canonical(record), type=TensorRecord) for record in records]
    decoder = LayoutDecoder(encoder.meshes, encoder.layouts, 8)
    decoded = [decoder.decode("x", record) for record in through]
    assert decoded == described
    for layout in described:
        check_cover("x", layout)


def test_equal_layouts_share_a_record_and_become_one_object() -> None:
    encoder = LayoutEncoder()
    layouts_ = [MeshLayout((4 * i, 2), Mesh((0, 1), (2,)), (Shard(0),)) for i in (1, 1, 2)]
    records = [encoder.encode("float32", layout) for layout in layouts_]
    assert (len(encoder.meshes), len(encoder.layouts)) == (1, 1)
    decoder = LayoutDecoder(encoder.meshes, encoder.layouts, 2)
    decoded = [decoder.decode("x", record) for record in records]
    assert decoded[0] is decoded[1]
    assert decoded[2] == layouts_[2]


def test_what_only_ranks_tell_each_other() -> None:
    encoder = LayoutEncoder()
    assert encoder.encode("int8", Replicated((3,))) == TensorRecord("int8", (3,), replicated=True)
    assert encoder.encode("int8", PerRankLayout((3,))) == TensorRecord("int8", per_rank=())
    assert LayoutDecoder((), (), 2).decode("x", TensorRecord("int8", (3,), replicated=True)) == Replicated((3,))


def test_volumes() -> None:
    assert checked_volume("x", (), 4) == 1
    assert checked_volume("x", (1 << 40, 1 << 20), 2) == 1 << 60
    for shape in ((1 << 40, 1 << 20), (1 << 62,)):
        with pytest.raises(InvalidManifest, match="overflows"):
            checked_volume("x", shape, 4)
    with pytest.raises(InvalidManifest, match="65 dimensions"):
        checked_volume("x", (1,) * 65, 1)


def test_huge_meshes_are_refused_before_they_are_made() -> None:
    for shape in ((1 << 40,), (1 << 20, 1 << 20), (0,)):
        with pytest.raises(InvalidManifest, match="ranks in a world of 8"):
            LayoutDecoder((MeshRecord(shape, strides=(1,) * len(shape)),), (), 8)
