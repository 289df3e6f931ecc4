# SPDX-License-Identifier: Apache-2.0
"""Differences: none between layouts, and the right count for each change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shardckpt
from shardckpt.errors import ChecksumMismatch
from shardckpt.layout import ITEMSIZE
from shardckpt.maintain.compare import Comparison, compare
from shardckpt.maintain.diff import Change, Difference, diff
from tests.engine.simulate import bits
from tests.maintain.make import flip, opened, rank_file, save_plain, tensors


def saved_and_compared(tmp_path: Path, a: dict[str, Any], b: dict[str, Any], **options: Any) -> Difference:
    for name, state in (("a", a), ("b", b)):
        shardckpt.save(tmp_path / name, state)
    return diff(opened(tmp_path / "a"), opened(tmp_path / "b"), **options)


def test_layouts_are_no_difference(everywhere: dict[str, Path]) -> None:
    plain = opened(everywhere["plain"])
    for layout, path in everywhere.items():
        found = diff(plain, opened(path))
        assert found.equal, layout
        assert found.tensors_compared == len(tensors()) + 3
        assert (found.tensors, found.values, found.kinds) == ((), (), ())
        assert bool(found.layouts) == (layout != "plain")
    (matrix,) = (c for c in diff(plain, opened(everywhere["grid"])).layouts if c.name == "matrix")
    assert matrix == Change(name="matrix", a="R on mesh 1, ranks 0", b="S(1), S(0) on mesh 2x2, ranks 0-3")


def test_elements_are_counted_across_layouts(everywhere: dict[str, Path], tmp_path: Path) -> None:
    matrix, wide, flags = (tensors()[name].clone() for name in ("matrix", "wide", "flags"))
    matrix[::2, 3] += 0.25
    wide[2, 990:] = 0
    wide[0, 0] = float("nan")
    flags[4] = ~flags[4]
    save_plain(tmp_path, {"matrix": matrix, "wide": wide, "flags": flags})
    for layout, path in everywhere.items():
        found = diff(opened(path), opened(tmp_path))
        assert not found.equal
        assert [(t.name, t.elements, t.differing, t.not_finite) for t in found.tensors] == [
            ("flags", 13, 1, 0),
            ("matrix", 37 * 11, 19, 0),
            ("wide", 3000, 11, 1),
        ], layout
        largest = [t.max_difference for t in found.tensors]
        assert largest == [None, pytest.approx(0.25), tensors()["wide"][2, 990:].abs().max().item()]


def test_names_kinds_and_values(tmp_path: Path) -> None:
    found = saved_and_compared(
        tmp_path,
        {
            "only_a": 1,
            "t": torch.ones(3),
            "v": {"x": 1, "y": [1.5]},
            "same": torch.ones(2),
            "turned": 1,
            "list": [torch.ones(1)],
        },
        {
            "only_b": torch.ones(1),
            "t": torch.ones(3, 1),
            "v": {"x": 2, "y": [1.5]},
            "same": torch.ones(2),
            "turned": torch.tensor(1),
            "list": (torch.ones(1),),
        },
    )
    assert not found.equal
    assert found.only_in_a == ("only_a",)
    assert found.only_in_b == ("only_b",)
    assert found.kinds == (
        Change(name="t", a="float32 [3]", b="float32 [3, 1]"),
        Change(name="turned", a="value", b="int64 []"),
    )
    assert [c.name for c in found.values] == ["list", "v/x"]
    assert found.values[1] == Change(name="v/x", a=1, b=2)
    assert found.tensors == ()
    assert found.tensors_compared == 2


def test_ties_are_compared_once_and_are_no_content(tmp_path: Path) -> None:
    save_plain(tmp_path / "tied")
    model = {key: tensor.clone() for key, tensor in shardckpt.load(tmp_path / "tied").state["model"].items()}
    save_plain(tmp_path / "apart", {"model": model})
    tied, apart = opened(tmp_path / "tied"), opened(tmp_path / "apart")
    assert diff(tied, tied, keys=["model/*"]).tensors_compared == 1
    for a, b in ((tied, apart), (apart, tied)):
        assert diff(a, b, keys=["model/*"]).equal
        assert diff(a, b, keys=["model/*"]).tensors_compared == 2
    model["head.weight"] += 1
    save_plain(tmp_path / "changed", {"model": model})
    found = diff(tied, opened(tmp_path / "changed"))
    assert [(t.name, t.differing) for t in found.tensors] == [("model/head.weight", 15)]


def test_what_ranks_have_for_themselves(everywhere: dict[str, Path], tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    save_plain(a)
    save_plain(b, {"rng": shardckpt.PerRank({"seed": 6, "state": torch.arange(4)})})
    assert diff(opened(a), opened(b)).equal
    found = diff(opened(a), opened(b), per_rank=True)
    assert [(t.name, t.rank, t.elements, t.differing) for t in found.tensors] == [("rng/seed", 0, 1, 1)]
    assert found.kinds == (Change(name="rng/state", a="int64 [3] of ranks 0", b="int64 [4] of ranks 0"),)
    assert diff(opened(everywhere["rows"]), opened(everywhere["flat"]), per_rank=True).equal
    other = diff(opened(everywhere["rows"]), opened(everywhere["grid"]), per_rank=True)
    assert {(c.name, c.a, c.b) for c in other.kinds} == {
        ("rng/seed", "per-rank value of ranks 0-1", "per-rank value of ranks 0-3"),
        ("rng/state", "int64 of ranks 0-1", "int64 of ranks 0-3"),
    }


def test_shapes_that_differ_on_one_rank(everywhere: dict[str, Path], tmp_path: Path) -> None:
    shardckpt.save(tmp_path / "a", {"x": shardckpt.PerRank("short")})
    shardckpt.save(tmp_path / "b", {"x": shardckpt.PerRank("longer")})
    (change,) = diff(opened(tmp_path / "a"), opened(tmp_path / "b"), per_rank=True).kinds
    assert change == Change(name="x", a="uint8 [7] of rank 0", b="uint8 [8] of rank 0")


def test_keys_and_memory(tmp_path: Path) -> None:
    large = torch.randn(3, 700_001)
    other = large.clone()
    other.view(-1)[torch.arange(0, large.numel(), 1000)] += 1
    found = saved_and_compared(tmp_path, {"x": large, "y": 1}, {"x": other, "y": 2}, keys=["x"], memory=2 << 20)
    assert [(t.name, t.differing) for t in found.tensors] == [("x", 2101)]
    assert found.values == ()


def test_damage_is_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_plain(tmp_path / name)
    flip(rank_file(tmp_path / "b"), -1)
    with pytest.raises(ChecksumMismatch):
        diff(opened(tmp_path / "a"), opened(tmp_path / "b"))


@given(
    st.sampled_from(sorted(name for name in ITEMSIZE if hasattr(torch, name))),
    st.integers(0, 40),
    st.sets(st.integers(0, 39)),
    st.integers(0, 1000),
)
def test_every_dtype_is_compared_bit_by_bit(dtype: str, numel: int, changed: set[int], seed: int) -> None:
    a = np.random.default_rng(seed).integers(0, 256, numel * ITEMSIZE[dtype], dtype=np.uint8)
    b = a.copy()
    places = [at for at in changed if at < numel]
    for at in places:
        b[at * ITEMSIZE[dtype]] ^= 1
    found = compare(a, b, dtype)
    assert found.differing == len(places)
    assert found.not_finite <= found.differing


def test_magnitudes() -> None:
    def compared(a: list[Any], b: list[Any], dtype: torch.dtype) -> Comparison:
        x, y = (bits(torch.tensor(values, dtype=dtype)).numpy() for values in (a, b))
        return compare(x, y, str(dtype).removeprefix("torch."))

    nan, inf = float("nan"), float("inf")
    assert compared([1.0, nan, 0.0], [1.0, nan, 0.0], torch.float32) == Comparison()
    assert compared([0.0], [-0.0], torch.float32) == Comparison(1, 0, 0.0)
    assert compared([1, nan, inf, 3], [1.5, 1, -inf, 1], torch.bfloat16) == Comparison(4, 2, 2.0)
    assert compared([nan], [1.0], torch.float64) == Comparison(1, 1, None)
    assert compared([3 + 4j], [0j], torch.complex64) == Comparison(1, 0, 5.0)
    assert compared([1, 2], [1, 3], torch.int32) == Comparison(1, 0, None)
    assert compared([True], [False], torch.bool) == Comparison(1, 0, None)
    assert Comparison(1, 1, None) + Comparison(2, 0, 0.5) + Comparison(1, 0, 0.25) == Comparison(4, 1, 0.5)


def test_long_runs_are_compared_in_steps() -> None:
    a = np.zeros(3_000_000 * 16, dtype=np.uint8)
    b = a.copy()
    b[::16_000_000] = 1
    assert compare(a, b, "complex128").differing == 3
