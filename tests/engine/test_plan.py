# SPDX-License-Identifier: Apache-2.0
"""Plans: every element is written once, lies where arithmetic says, and the writing is shared out evenly."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.layout import Ints, Mesh, MeshLayout, PerRankShapes, Placement, Replicate, Replicated, Shard
from shardckpt.plan import (
    MAX_BLOCK,
    MAX_DIGESTS,
    MIN_BLOCK,
    MIN_SLICE,
    SMALL,
    Plan,
    PlannedTensor,
    choose_block_size,
    make_plan,
)
from shardckpt.tables import GlobalTensor
from tests.engine.simulate import describe, merge
from tests.engine.strategies import plans, total_elements
from tests.layout import brute
from tests.layout.strategies import pieces


@pytest.mark.slow
@settings(max_examples=200)
@given(plans())
def test_every_element_is_written_once(plan: Plan) -> None:
    for tensor in plan.tensors:
        written: list[int] = []
        for rank in range(plan.world_size):
            stored = tensor.stored(rank)
            if isinstance(tensor.layout, PerRankShapes):
                shape = tensor.layout.shape_of(rank)
                assert (0 if stored is None else stored.numel) == (0 if shape is None else prod(shape))
            elif stored is not None:
                written += brute.held(stored, tensor.layout.shape).tolist()
        if not isinstance(tensor.layout, PerRankShapes):
            assert sorted(written) == list(range(prod(tensor.layout.shape)))


@pytest.mark.slow
@given(plans())
def test_files_hold_pieces_back_to_back_largest_items_first(plan: Plan) -> None:
    order = [tensor.name for tensor in plan.tensors]
    assert order == sorted(order, key=lambda name: (-plan.by_name[name].itemsize, plan.by_name[name].is_replicated, name))
    for rank in range(plan.world_size):
        pieces = plan.file_pieces(rank)
        assert [found.tensor.name for found in pieces] == [name for name in order if name in plan.offsets(rank)]
        at = 0
        for found in pieces:
            start, stop = found.local
            held = found.tensor.layout.piece(rank)
            assert held is not None
            assert found.offset == at == plan.offsets(rank)[found.tensor.name]
            assert found.offset % found.tensor.itemsize == 0
            assert found.piece == held.window(start, stop) == found.tensor.stored(rank)
            assert found.nbytes == (stop - start) * found.tensor.itemsize > 0
            at += found.nbytes
        assert plan.bytes_by_rank[rank] == at
    assert plan.total_bytes == plan.bytes_by_rank.sum()
    assert sum(p.piece.numel for r in range(plan.world_size) for p in plan.file_pieces(r)) == total_elements(plan)


@pytest.mark.slow
@settings(max_examples=200)
@given(plans(), st.data())
def test_what_is_stored_over_a_piece_is_all_of_it(plan: Plan, data: st.DataObject) -> None:
    for tensor in plan.tensors:
        if isinstance(tensor.layout, PerRankShapes):
            continue
        wanted = data.draw(pieces(tensor.layout.shape))
        found = list(tensor.stored_over(wanted)) if wanted.numel else []
        assert len(found) == len(set(found))
        held: list[int] = []
        for rank, piece in found:
            assert piece == tensor.stored(rank)
            held += brute.held(piece, tensor.layout.shape).tolist()
        assert set(brute.held(wanted, tensor.layout.shape).tolist()) <= set(held)
        assert len(held) == len(set(held))


# ---- sharing out the writing


def gpt2(layers: int = 12, width: int = 768, vocabulary: int = 50257) -> Iterator[tuple[str, Ints]]:
    """Parameters of GPT-2, 124 M by default."""
    yield "wte.weight", (vocabulary, width)
    yield "wpe.weight", (1024, width)
    for i in range(layers):
        for norm in ("ln_1", "ln_2"):
            yield f"h.{i}.{norm}.weight", (width,)
            yield f"h.{i}.{norm}.bias", (width,)
        linear = {"attn.c_attn": 3 * width, "attn.c_proj": width, "mlp.c_fc": 4 * width}
        for name, out in linear.items():
            yield f"h.{i}.{name}.weight", (width, out)
            yield f"h.{i}.{name}.bias", (out,)
        yield f"h.{i}.mlp.c_proj.weight", (4 * width, width)
        yield f"h.{i}.mlp.c_proj.bias", (width,)
    yield "ln_f.weight", (width,)
    yield "ln_f.bias", (width,)


def llama(layers: int = 32, width: int = 4096, hidden: int = 14336, heads: int = 1024) -> Iterator[tuple[str, Ints]]:
    """Parameters of Llama 3 8B by default."""
    yield "tok_embeddings.weight", (128256, width)
    yield "output.weight", (128256, width)
    yield "norm.weight", (width,)
    for i in range(layers):
        shapes = {"wq": (width, width), "wk": (heads, width), "wv": (heads, width), "wo": (width, width)}
        for name, shape in shapes.items():
            yield f"layers.{i}.attention.{name}.weight", shape
        for name, shape in {"w1": (hidden, width), "w2": (width, hidden), "w3": (hidden, width)}.items():
            yield f"layers.{i}.feed_forward.{name}.weight", shape
        for name in ("attention_norm", "ffn_norm"):
            yield f"layers.{i}.{name}.weight", (width,)


def with_adam(
    parameters: Iterator[tuple[str, Ints]], mesh: Mesh, placements: tuple[Placement, ...], dtype: str = "float32"
) -> list[GlobalTensor]:
    """A model and its Adam state; step counters are plain tensors on all ranks."""
    everywhere = Mesh(tuple(range(len(mesh.ranks))), (len(mesh.ranks),))
    tensors = []
    for name, shape in parameters:
        layout = MeshLayout(shape, mesh, placements)
        tensors.append(GlobalTensor(f"model/{name}", dtype, layout))
        for key in ("exp_avg", "exp_avg_sq"):
            tensors.append(GlobalTensor(f"optimizer/state/{name}/{key}", "float32", layout))
        step = MeshLayout((), everywhere, (Replicate(),))
        tensors.append(GlobalTensor(f"optimizer/state/{name}/step", "float32", step))
    return tensors


def imbalance(plan: Plan) -> float:
    """Most bytes of a rank over the mean."""
    return float(plan.bytes_by_rank.max() / plan.bytes_by_rank.mean())


def line(ranks: int) -> Mesh:
    return Mesh(tuple(range(ranks)), (ranks,))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 16, 64])
def test_replicas_share_a_ddp_model_evenly(ranks: int) -> None:
    plan = make_plan(ranks, with_adam(gpt2(), line(ranks), (Replicate(),)))
    assert imbalance(plan) < 1.1
    assert plan.total_bytes == 3 * 4 * 124_439_808 + 4 * 148


@pytest.mark.parametrize("mesh_shape", [(2, 2), (2, 4), (4, 8), (3, 5), (16, 8)])
def test_replicas_share_an_hsdp_model_evenly(mesh_shape: Ints) -> None:
    mesh = Mesh(tuple(range(prod(mesh_shape))), mesh_shape)
    plan = make_plan(len(mesh.ranks), with_adam(llama(), mesh, (Replicate(), Shard(0)), "bfloat16"))
    assert imbalance(plan) < 1.1
    assert plan.total_bytes == (2 + 4 + 4) * 8_030_261_248 + 4 * 291


@pytest.mark.parametrize("ranks", [2, 8])
def test_a_small_model_costs_few_files(ranks: int) -> None:
    """Small pieces stay together: a load should not open a file per bias."""
    plan = make_plan(ranks, with_adam(gpt2(1, 32, 500), line(ranks), (Replicate(),)))
    assert plan.total_bytes < SMALL
    assert plan.bytes_by_rank.tolist() == [plan.total_bytes] + [0] * (ranks - 1)


def test_large_replicas_are_cut_and_small_ones_are_not() -> None:
    mesh = line(4)

    def tensor(name: str, numel: int) -> GlobalTensor:
        return GlobalTensor(name, "uint8", MeshLayout((numel,), mesh, (Replicate(),)))

    plan = make_plan(4, [tensor("small", SMALL - 1), tensor("large", SMALL)])
    assert plan.by_name["small"].writers == (0, 1)
    assert plan.by_name["large"].writers == (0, 4)


def test_no_slice_is_tiny() -> None:
    ranks = 64
    tensors = [GlobalTensor(f"t{i}", "uint8", MeshLayout((SMALL,), line(ranks), (Replicate(),))) for i in range(40)]
    plan = make_plan(ranks, tensors)
    slices = [piece.nbytes for rank in range(ranks) for piece in plan.file_pieces(rank)]
    assert min(slices) >= MIN_SLICE
    assert imbalance(plan) <= 1.1


def test_aliases_are_not_written() -> None:
    tensors = [
        GlobalTensor("a", "float32", MeshLayout((8,), line(2), (Shard(0),))),
        GlobalTensor("b", "", None, alias_of="a"),
    ]
    plan = make_plan(2, tensors)
    assert list(plan.by_name) == ["a"]
    assert plan.aliases == {"b": "a"}
    assert plan.total_bytes == 32


@given(st.integers(0, 1 << 45))
def test_block_sizes_keep_the_manifest_small(total: int) -> None:
    size = choose_block_size(total)
    assert MIN_BLOCK <= size <= MAX_BLOCK
    assert size & (size - 1) == 0
    assert size == MAX_BLOCK or total <= size * MAX_DIGESTS
    assert size == MIN_BLOCK or total > size // 2 * MAX_DIGESTS


def test_tables_of_ranks_lead_to_the_same_plan_as_global_knowledge() -> None:
    """From what single ranks say, by tables, to the plan: a large model on a 2-D mesh."""
    mesh = Mesh(tuple(range(8)), (2, 4))
    tensors = with_adam(gpt2(), mesh, (Replicate(), Shard(0)))
    layouts = {t.name: t.layout if "step" not in t.name else Replicated(()) for t in tensors if t.layout is not None}
    dtypes = {t.name: t.dtype for t in tensors}
    plan = make_plan(8, merge([describe(rank, layouts, dtypes) for rank in range(8)]))
    direct = make_plan(8, sorted(tensors, key=lambda t: t.name))
    assert plan.tensors == direct.tensors
    assert plan.bytes_by_rank.tolist() == direct.bytes_by_rank.tolist()


def test_a_shape_of_a_per_rank_tensor_is_that_of_the_first_rank_that_has_one() -> None:
    assert PlannedTensor("x", "uint8", PerRankShapes((None, (3,), (4,)))).shape == (3,)
    assert PlannedTensor("x", "uint8", PerRankShapes(())).shape == ()
