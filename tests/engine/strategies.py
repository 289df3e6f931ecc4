# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies of plans: layouts of all kinds, replicas that share the writing in any way, small blocks."""

from __future__ import annotations

from math import prod

from hypothesis import strategies as st

from shardckpt.layout import GlobalLayout, MeshLayout, PerRankShapes
from shardckpt.plan import Plan
from tests.engine.simulate import by_hand
from tests.layout.strategies import layouts, shapes

DTYPES = ["float32", "bfloat16", "uint8", "int64", "bool", "complex128", "float8_e4m3fn"]


@st.composite
def per_rank_shapes(draw: st.DrawFn, world_size: int) -> PerRankShapes:
    found = tuple(draw(st.none() | shapes(2, 5)) for _ in range(world_size))
    if not any(found):
        found = ((3,),) * world_size
    return PerRankShapes(found[:1] if len(set(found)) == 1 else found)


@st.composite
def writers(draw: st.DrawFn, layout: GlobalLayout) -> tuple[int, int]:
    """Any writers that a manifest may give to a layout."""
    if not isinstance(layout, MeshLayout):
        return 0, 1
    return draw(st.integers(0, layout.replicas - 1)), draw(st.integers(1, layout.replicas))


@st.composite
def plans(draw: st.DrawFn, max_size: int = 9) -> Plan:
    """A few tensors on up to 8 ranks. Replicas may be stacked so that slices are smaller than rows, or empty."""
    world_size = draw(st.integers(1, 8))
    tensors = {}
    for number in range(draw(st.integers(1, 4))):
        layout: GlobalLayout = draw(st.one_of(layouts(draw(shapes(3, max_size)), world_size), per_rank_shapes(world_size)))
        tensors[f"t{number}"] = (draw(st.sampled_from(DTYPES)), layout, draw(writers(layout)))
    return by_hand(world_size, tensors, 4096 if draw(st.booleans()) else None)


def total_elements(plan: Plan) -> int:
    """Elements of all tensors of a plan, each one counted once."""
    total = 0
    for tensor in plan.tensors:
        if isinstance(tensor.layout, PerRankShapes):
            found = [tensor.layout.shape_of(rank) for rank in range(plan.world_size)]
            total += sum(prod(shape) for shape in found if shape is not None)
        else:
            total += prod(tensor.layout.shape)
    return total
