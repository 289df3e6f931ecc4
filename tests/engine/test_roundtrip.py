# SPDX-License-Identifier: Apache-2.0
"""From any layout through files to any other layout, bit for bit: written and read by the engine, without processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.layout import FlatLayout, Mesh, MeshLayout, PerRankShapes, Piece, Replicate, Shard, StridedShard
from shardckpt.plan import Plan
from shardckpt.read import Destination
from shardckpt.reshard import Want
from shardckpt.store import MemoryStore
from tests.engine.simulate import Simulated, by_hand, part, same_bits, save
from tests.engine.strategies import plans
from tests.layout.strategies import Spread, layouts

_numbers = itertools.count()


def new_store() -> MemoryStore:
    return MemoryStore(f"round-trip-{next(_numbers)}")


def targets(data: st.DataObject, plan: Plan) -> Iterator[tuple[str, Piece, int | None]]:
    """Pieces that ranks of another layout want; of a per-rank tensor what each rank has."""
    for tensor in plan.tensors:
        if isinstance(tensor.layout, PerRankShapes):
            for rank in range(plan.world_size):
                piece = tensor.layout.piece(rank)
                if piece is not None:
                    yield tensor.name, piece, rank
        else:
            layout: Spread = data.draw(layouts(tensor.layout.shape))
            for rank in sorted(layout.ranks):
                piece = layout.piece(rank)
                assert piece is not None
                yield tensor.name, piece, None


@pytest.mark.slow
@settings(max_examples=150)
@given(plans(), st.data())
def test_any_layout_is_loaded_as_any_other(plan: Plan, data: st.DataObject) -> None:
    saved = save(new_store(), plan)
    wants = list(targets(data, plan))
    for (name, piece, rank), loaded in zip(wants, saved.load(wants), strict=True):
        assert same_bits(loaded, part(saved.wholes[name, rank], piece))


@pytest.mark.slow
@settings(max_examples=40)
@given(plans(max_size=24), st.data())
def test_memory_of_any_strides_is_filled(plan: Plan, data: st.DataObject) -> None:
    saved = save(new_store(), plan)
    wants: list[Want] = []
    destinations: dict[int, Destination] = {}
    for name, piece, rank in targets(data, plan):
        if piece.is_window:
            continue
        tensor = plan.by_name[name]
        dtype = getattr(torch, tensor.dtype)
        order = data.draw(st.permutations(range(len(piece.shape))))
        step = data.draw(st.integers(1, 2))
        sizes = [piece.shape[dim] for dim in order]
        memory = torch.zeros([size * step for size in sizes], dtype=dtype)
        strided = memory[tuple(slice(None, None, step) for _ in sizes)]
        view = strided.permute([order.index(dim) for dim in range(len(order))])
        wants.append(Want(len(wants), tensor, piece, rank))
        destinations[wants[-1].key] = Destination(view, piece)
    saved.load_into(wants, destinations)
    for want in wants:
        assert same_bits(destinations[want.key].data.clone(), part(saved.wholes[want.tensor.name, want.rank], want.piece))


# ---- tensors larger than the chunks in which files are written and read

ROWS, COLUMNS = 3001, 1500
LINE4 = Mesh((0, 1, 2, 3), (4,))
GRID = Mesh((0, 1, 2, 3), (2, 2))
SHAPE = (ROWS, COLUMNS)
NUMEL = ROWS * COLUMNS
LARGE: dict[str, Spread] = {
    "rows": MeshLayout(SHAPE, LINE4, (Shard(0),)),
    "columns": MeshLayout(SHAPE, LINE4, (Shard(1),)),
    "replicated": MeshLayout(SHAPE, LINE4, (Replicate(),)),
    "hybrid": MeshLayout(SHAPE, GRID, (Replicate(), Shard(0))),
    "both dimensions": MeshLayout(SHAPE, GRID, (Shard(1), Shard(0))),
    "strided": MeshLayout(SHAPE, GRID, (StridedShard(0, 2), Shard(0))),
    "flat": FlatLayout(SHAPE, ((1, 0, 7), (0, 7, 1_600_001), (3, 1_600_001, 1_600_001), (2, 1_600_001, NUMEL))),
    "flat elsewhere": FlatLayout(
        SHAPE, ((0, 0, 900_000), (1, 900_000, 3_000_001), (2, 3_000_001, 3_000_003), (3, 3_000_003, NUMEL))
    ),
}


def all_ranks(layout: Spread) -> list[Piece]:
    found = [layout.piece(rank) for rank in sorted(layout.ranks)]
    return [piece for piece in found if piece is not None]


@pytest.fixture(scope="module")
def large() -> dict[str, Simulated]:
    """17 MiB of bfloat16 and a few bytes before it, so that chunks and blocks do not start where tensors do."""
    saved = {}
    for name, layout in LARGE.items():
        count = layout.replicas if isinstance(layout, MeshLayout) else 1
        small = MeshLayout((5,), LINE4, (Shard(0),))
        plan = by_hand(4, {"a": ("float32", small, (0, 1)), "big": ("bfloat16", layout, (count - 1, count))})
        saved[name] = save(new_store(), plan)
    return saved


PAIRS = [
    pytest.param(source, target, id=f"{source} to {target}", marks=[] if (a + b) % 3 == 0 else [pytest.mark.slow])
    for a, source in enumerate(LARGE)
    for b, target in enumerate(LARGE)
]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_large_tensors_cross_chunks(large: dict[str, Simulated], source: str, target: str) -> None:
    saved = large[source]
    wanted = all_ranks(LARGE[target])
    for piece, loaded in zip(wanted, saved.load([("big", piece, None) for piece in wanted]), strict=True):
        assert torch.equal(loaded.view(torch.int16), part(saved.wholes["big", None].view(torch.int16), piece))


@pytest.mark.parametrize("source", LARGE)
def test_values_are_converted_on_the_way(large: dict[str, Simulated], source: str) -> None:
    saved = large[source]
    piece = Piece.box((100, 0), (1500, COLUMNS))
    (loaded,) = saved.load([("big", piece, None)], dtype="float64")
    expected = part(saved.wholes["big", None], piece).double()
    assert torch.equal(loaded.isnan(), expected.isnan())
    assert torch.equal(loaded.nan_to_num(0.0), expected.nan_to_num(0.0))
