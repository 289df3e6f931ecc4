# SPDX-License-Identifier: Apache-2.0
"""From what each rank says to what all ranks hold: submeshes are stacked, stages joined, contradictions named."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.errors import TableMismatch
from shardckpt.layout import (
    BoxLayout,
    FlatLayout,
    GlobalLayout,
    Layout,
    Mesh,
    MeshLayout,
    PerRankLayout,
    PerRankShapes,
    Replicate,
    Replicated,
    Shard,
)
from shardckpt.tables import Described, GlobalTensor, encode_table, merge_tables, per_rank_shapes
from tests.engine.simulate import describe, merge
from tests.layout.strategies import layouts, shapes

GRID = Mesh((0, 1, 2, 3), (2, 2))


def merged_layout(*says: Layout | None, dtype: str = "float32") -> GlobalLayout | None:
    """The layout of one tensor that each rank describes like this; None for a rank that does not list it."""
    (tensor,) = merge([[Described("x", dtype, layout)] if layout is not None else [] for layout in says])
    return tensor.layout


# ---- what fits together


def test_a_plain_tensor_is_replicated_over_the_ranks_that_list_it() -> None:
    plain = Replicated((3, 4))
    assert merged_layout(plain, plain) == MeshLayout((3, 4), Mesh((0, 1), (2,)), (Replicate(),))
    assert merged_layout(None, plain, None, plain) == MeshLayout((3, 4), Mesh((1, 3), (2,)), (Replicate(),))


@given(st.data(), shapes())
def test_what_ranks_say_of_a_layout_becomes_that_layout(data: st.DataObject, shape: tuple[int, ...]) -> None:
    layout = data.draw(layouts(shape, 8))
    (tensor,) = merge([describe(rank, {"x": layout}, {"x": "int16"}) for rank in range(8)])
    assert (tensor.name, tensor.dtype, type(tensor.layout)) == ("x", "int16", type(layout))
    assert tensor.layout is not None
    assert [tensor.layout.piece(rank) for rank in range(8)] == [layout.piece(rank) for rank in range(8)]


def test_submeshes_are_stacked_as_replicas() -> None:
    """FSDP2 with tensor parallelism: what the latter leaves alone lives on each data-parallel submesh."""
    columns = [Mesh((0, 2), (2,)), Mesh((1, 3), (2,))]
    says = [MeshLayout((8,), columns[rank % 2], (Shard(0),)) for rank in range(4)]
    stacked = merged_layout(*says)
    assert stacked == MeshLayout((8,), Mesh((0, 2, 1, 3), (2, 2)), (Replicate(), Shard(0)))
    for rank in range(4):
        assert stacked.piece(rank) == says[rank].piece(rank)


def test_flat_pieces_are_put_together_by_rank() -> None:
    said = [FlatLayout((10,), ((2, 0, 3),)), FlatLayout((10,), ((0, 3, 3),)), FlatLayout((10,), ((1, 3, 10),))]
    assert merged_layout(said[1], said[2], said[0]) == FlatLayout((10,), ((2, 0, 3), (0, 3, 3), (1, 3, 10)))


def test_boxes_are_put_together_by_rank() -> None:
    said = [BoxLayout((4, 4), ((rank, (0, 2 * rank), (4, 2)),)) for rank in range(2)]
    assert merged_layout(*said) == BoxLayout((4, 4), ((0, (0, 0), (4, 2)), (1, (0, 2), (4, 2))))


def test_per_rank_tensors_have_shapes_of_their_own() -> None:
    says = [PerRankLayout((2,)), None, PerRankLayout((5, 1))]
    assert merged_layout(*says) == PerRankShapes(((2,), None, (5, 1)))
    assert merged_layout(PerRankLayout((3,)), PerRankLayout((3,))) == PerRankShapes(((3,),))


def test_pipeline_stages_hold_different_names() -> None:
    stages = [Mesh((0, 1), (2,)), Mesh((2, 3), (2,))]
    says = [
        [Described(f"layers.{rank // 2}", "float32", MeshLayout((4,), stages[rank // 2], (Shard(0),)))] for rank in range(4)
    ]
    merged = merge([[*mine, Described("step", "int64", Replicated(()))] for mine in says])
    ranks = {tensor.name: sorted(tensor.layout.ranks) for tensor in merged if isinstance(tensor.layout, MeshLayout)}
    assert ranks == {"layers.0": [0, 1], "layers.1": [2, 3], "step": [0, 1, 2, 3]}


def test_aliases_are_merged() -> None:
    plain = [Described("a", "float32", Replicated((2,))), Described("b", "float32", Replicated((2,)), alias_of="a")]
    merged = merge([plain, plain])
    assert merged[1] == GlobalTensor("b", "", None, alias_of="a")


def test_values_keep_their_mark() -> None:
    (tensor,) = merge([[Described("v", "uint8", PerRankLayout((3 + rank,)), is_value=True)] for rank in range(2)])
    assert tensor == GlobalTensor("v", "uint8", PerRankShapes(((3,), (4,))), is_value=True)


def test_equal_layouts_become_one_object() -> None:
    layout = MeshLayout((8,), GRID, (Shard(0), Replicate()))
    merged = merge([[Described("a", "float32", layout), Described("b", "float32", layout)]] * 4)
    assert merged[0].layout is merged[1].layout


def test_ranks_with_the_same_kind_of_state_have_equal_tables() -> None:
    layout = MeshLayout((8,), GRID, (Shard(0), Replicate()))
    shared = [Described("a", "float32", layout), Described("b", "int64", Replicated(()))]
    tables = {
        encode_table(["t"], [*order, Described("r", "uint8", PerRankLayout((n,)))])
        for n, order in enumerate([shared, shared[::-1]])
    }
    assert len(tables) == 1


def test_cost_follows_distinct_tables() -> None:
    """4,096 ranks with two kinds of state, 300 tensors: tables of a few kilobytes, merged in no time."""
    world = 4096
    mesh = Mesh(tuple(range(world)), (world,))
    common = [Described(f"t{i:03}", "float32", MeshLayout((8192, 8192), mesh, (Shard(0),))) for i in range(300)]
    tables = [encode_table(["m"], common), encode_table(["m"], [*common, Described("x", "int64", Replicated(()))])]
    assert len(tables[0]) < 40_000
    merged = merge_tables(tables, [0] * (world - 1) + [1], [{}] * world)
    assert len(merged) == 301
    assert merged[-1].layout == MeshLayout((), Mesh((world - 1,), (1,)), (Replicate(),))


# ---- what does not


def both(*says: Layout) -> list[list[Described]]:
    return [[Described("w", "float32", layout)] for layout in says]


MISMATCHES: list[tuple[str, Sequence[Sequence[Described]], str, list[int] | None]] = [
    (
        "shapes of a plain tensor",
        both(Replicated((3,)), Replicated((4,))),
        r"'w' is float32\[3\] on rank 0 but float32\[4\] on rank 1.*PerRank",
        [0, 1],
    ),
    (
        "dtypes",
        [[Described("w", "float32", Replicated((3,)))], [Described("w", "bfloat16", Replicated((3,)))]],
        r"'w' is float32\[3\] on rank 0 but bfloat16\[3\] on rank 1",
        [0, 1],
    ),
    (
        "a second name on one rank only",
        [
            [Described("a", "float32", Replicated((3,))), Described("w", "float32", Replicated((3,)), alias_of="a")],
            [Described("a", "float32", Replicated((3,))), Described("w", "float32", Replicated((3,)))],
        ],
        r"'w' is tied to 'a' on rank 0 but float32\[3\] on rank 1",
        [0, 1],
    ),
    (
        "per rank on one rank only",
        both(PerRankLayout((3,)), Replicated((3,))),
        r"'w' is per rank float32 on rank 0 but float32\[3\] on rank 1",
        [0, 1],
    ),
    (
        "sharded on one rank, plain on another",
        both(MeshLayout((4,), Mesh((0, 1), (2,)), (Shard(0),)), Replicated((4,))),
        "'w' as ranks .0, 1. describe it: it is sharded on some ranks and plain on others",
        None,
    ),
    (
        "placements",
        both(MeshLayout((4,), Mesh((0, 1), (2,)), (Shard(0),)), MeshLayout((4,), Mesh((0, 1), (2,)), (Replicate(),))),
        "its meshes differ between ranks in more than their ranks",
        None,
    ),
    (
        "meshes that share a rank",
        both(
            MeshLayout((4,), Mesh((0, 1), (2,)), (Shard(0),)),
            MeshLayout((4,), Mesh((1, 2), (2,)), (Shard(0),)),
            MeshLayout((4,), Mesh((1, 2), (2,)), (Shard(0),)),
        ),
        "they share ranks",
        None,
    ),
    (
        "meshes of other shapes",
        both(
            MeshLayout((4,), Mesh((0,), (1,)), (Shard(0),)),
            MeshLayout((4,), Mesh((1, 2), (2,)), (Shard(0),)),
            MeshLayout((4,), Mesh((1, 2), (2,)), (Shard(0),)),
        ),
        "its meshes differ",
        None,
    ),
    (
        "a rank of the mesh is silent",
        [*both(*[MeshLayout((4,), Mesh((0, 1, 2), (3,)), (Shard(0),))] * 2), []],
        r"'w' is sharded over ranks \[0, 1, 2\], but ranks \[2\] did not list it.*have to pass it",
        [2],
    ),
    (
        "a rank outside of the mesh lists it",
        both(*[MeshLayout((4,), Mesh((0, 1), (2,)), (Shard(0),))] * 3),
        r"but ranks \[2\] list it too",
        [2],
    ),
    (
        "a rank that holds a flat piece is silent",
        [*both(FlatLayout((9,), ((0, 0, 4), (1, 4, 9)))), []],
        r"'w' is sharded over ranks \[0, 1\], but ranks \[1\] did not list it",
        [1],
    ),
    (
        "a rank that holds a box is silent",
        [*both(BoxLayout((4, 2), ((0, (0, 0), (2, 2)), (1, (2, 0), (2, 2))))), []],
        r"'w' is sharded over ranks \[0, 1\], but ranks \[1\] did not list it",
        [1],
    ),
    (
        "a gap between flat pieces",
        both(FlatLayout((9,), ((0, 0, 4),)), FlatLayout((9,), ((1, 5, 9),))),
        "flat ranges leave a gap or overlap at element 4",
        None,
    ),
    (
        "flat pieces that overlap",
        both(FlatLayout((9,), ((0, 0, 6),)), FlatLayout((9,), ((1, 4, 9),))),
        "flat ranges leave a gap or overlap at element 4",
        None,
    ),
    (
        "flat pieces that stop early",
        both(FlatLayout((9,), ((0, 0, 4),)), FlatLayout((9,), ((1, 4, 8),))),
        "flat ranges cover 8 of 9 elements",
        None,
    ),
    (
        "boxes that overlap",
        both(BoxLayout((4, 2), ((0, (0, 0), (2, 2)),)), BoxLayout((4, 2), ((1, (1, 0), (2, 2)),))),
        r"boxes at \(0, 0\) and \(1, 0\) overlap",
        None,
    ),
    (
        "flat on one rank, boxed on another",
        both(FlatLayout((4,), ((0, 0, 4),)), BoxLayout((4,), ((1, (0,), (4,)),))),
        "plain on others",
        None,
    ),
]


@pytest.mark.parametrize(("says", "message", "ranks"), [m[1:] for m in MISMATCHES], ids=[m[0] for m in MISMATCHES])
def test_contradictions_are_named(says: Sequence[Sequence[Described]], message: str, ranks: list[int] | None) -> None:
    with pytest.raises(TableMismatch, match=message) as caught:
        merge(says)
    assert caught.value.name == "w"
    assert caught.value.details.get("ranks") == ranks


def test_ranks_need_the_same_top_level_keys() -> None:
    tables = [encode_table(["model", "optimizer"], []), encode_table(["model"], [])]
    with pytest.raises(TableMismatch, match=r"\['optimizer'\] are not on both rank 0 and rank 2.*empty mapping") as caught:
        merge_tables(tables, [0, 0, 1], [{}] * 3)
    assert caught.value.keys == ["optimizer"]
    assert caught.value.ranks == [0, 2]


def test_long_lists_of_ranks_are_cut() -> None:
    world = 20
    mesh = Mesh(tuple(range(world)), (world,))
    says = [[Described("w", "float32", MeshLayout((4,), mesh, (Shard(0),)))] if rank < 10 else [] for rank in range(world)]
    with pytest.raises(TableMismatch, match=r"\[10, 11, 12, 13, 14, 15, 16, 17, ... 10 in all\]") as caught:
        merge(says)
    assert caught.value.ranks == list(range(10, 20))


def test_per_rank_shapes_are_kept_out_of_the_table() -> None:
    described = [Described("r", "uint8", PerRankLayout((5,))), Described("a", "uint8", Replicated((2,)))]
    assert per_rank_shapes(described) == {"r": (5,)}
