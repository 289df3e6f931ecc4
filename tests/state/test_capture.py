# SPDX-License-Identifier: Apache-2.0
"""Capturing states: what is a leaf, what is refused and with what advice, and that nothing is copied."""

from __future__ import annotations

import dataclasses
import enum
import io
import re
import warnings
from collections import Counter, OrderedDict, defaultdict, namedtuple
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from shardckpt.adapters.dtypes import dtype_name, dtype_named
from shardckpt.errors import DuplicateName, StateError, UnsupportedLeaf
from shardckpt.layout import ITEMSIZE, FlatLayout, PerRankLayout, Replicated
from shardckpt.state import Flat, PerRank, Whereabouts, capture
from shardckpt.values import Container
from tests.state.memory import bits, load, save

DTYPES = [dtype_named(name) for name in ITEMSIZE if hasattr(torch, name)]


def test_mappings_are_nodes_and_the_rest_is_values() -> None:
    state = {
        "a": {"b": 1, "c~/d": [1, (2, None)], "empty": {}, "ints": {1: {"x": 2}}},
        "proxy": MappingProxyType({"x": "y"}),
        "ordered": OrderedDict(z=b"z"),
        "count": Counter({"k": 1}),
    }
    assert capture(state).values == {
        "a/b": 1,
        "a/c~0~1d": [1, (2, None)],
        "a/empty": {},
        "a/ints": {1: {"x": 2}},
        "proxy/x": "y",
        "ordered/z": b"z",
        "count": Counter({"k": 1}),
    }


def test_lists_tuples_and_other_mappings_that_hold_tensors_are_containers() -> None:
    t = torch.arange(3)
    captured = capture({"a": [t, {"b": (t.clone(), 5)}], "d": {2: t.clone(), "k": None}})
    assert [tensor.name for tensor in captured.tensors] == ["a/0", "a/1/b/0", "d/2"]
    assert captured.values == {"a/1/b/1": 5, "d/k": None}
    assert captured.containers == {
        "a": Container.of("list", 2),
        "a/1/b": Container.of("tuple", 2),
        "d": Container("dict", (2, "k")),
    }


def test_round_trip_of_containers() -> None:
    state = {"a": [torch.arange(3), {"b": (torch.ones(2), 5)}], "d": {2: torch.zeros(()), "k": None, (1, 2): 3}}
    target: dict[str, Any] = {
        "a": [torch.zeros(3, dtype=torch.int64), {"b": (torch.zeros(2), 0)}],
        "d": {2: torch.ones(()), "k": 1, (1, 2): 0},
    }
    kept = target["a"][0]
    done = load(save(state), target)
    assert not done.missing and not done.unexpected
    assert target["a"][0] is kept and torch.equal(kept, torch.arange(3))
    assert target["a"][1]["b"][1] == 5 and torch.equal(target["a"][1]["b"][0], torch.ones(2))
    assert target["d"] == {2: torch.zeros(()), "k": None, (1, 2): 3}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (7,), (3, 4)], ids=str)
def test_every_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    if dtype == torch.bool:
        raw &= 1
    tensor = raw.view(dtype).view(shape)
    captured = capture({"t": tensor}).tensors[0]
    assert captured.data.data_ptr() == tensor.data_ptr()
    assert captured.layout == Replicated(shape)
    target = {"t": torch.empty(shape, dtype=dtype)}
    load(save({"t": tensor}), target)
    assert bits(target["t"]) == bits(tensor)


def test_views_are_passed_as_they_are() -> None:
    base = torch.arange(24.0).view(4, 6)
    views = {
        "t": base.t(),
        "step": base[::2, 1::2],
        "expanded": base[:1].expand(4, 6),
        "flipped": base.flip(0),
        "grad": torch.nn.Parameter(base * 2),
    }
    for tensor in capture(views).tensors:
        original = views[tensor.name]
        assert type(tensor.data) is torch.Tensor and not tensor.data.requires_grad
        assert tensor.data.data_ptr() == original.data_ptr()
        assert tensor.data.stride() == original.stride()


class Labelled(torch.Tensor):
    """A tensor with behaviour of its own around one plain tensor, as float8 training has."""

    wrapped: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Labelled:
        made: Labelled = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())
        made.wrapped = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["wrapped"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return cls(func(args[0].wrapped, *args[1:], **(kwargs or {})))


def test_subclasses_that_only_add_behaviour_are_seen_through() -> None:
    source, target = Labelled(torch.arange(3.0)), Labelled(torch.zeros(3))
    load(save({"t": torch.nn.Parameter(source)}), {"t": target})
    assert torch.equal(target.wrapped, source.wrapped)


def test_lazy_conjugation_and_negation_are_resolved() -> None:
    z = torch.tensor([1 + 2j, 3 - 4j])
    state = {"conj": z.conj(), "imag": z.conj().imag}
    found = {tensor.name: tensor.data for tensor in capture(state).tensors}
    assert torch.equal(found["conj"], torch.tensor([1 - 2j, 3 + 4j])) and not found["conj"].is_conj()
    assert torch.equal(found["imag"], torch.tensor([-2.0, 4.0])) and not found["imag"].is_neg()


def test_the_same_tensor_under_two_names_is_stored_once() -> None:
    t = torch.ones(2)
    captured = capture({"a": t, "b": {"c": t}, "d": t.clone()})
    assert [(tensor.name, tensor.alias_of) for tensor in captured.tensors] == [("a", None), ("b/c", "a"), ("d", None)]


def test_flat_slices() -> None:
    data = torch.arange(5.0)
    tensor = capture({"f": Flat(data, (3, 4), 2)}, Whereabouts(1, 3)).tensors[0]
    assert tensor.layout == FlatLayout((3, 4), ((1, 2, 7),))
    assert tensor.data.data_ptr() == data.data_ptr() and tensor.data.shape == (5,)
    whole = capture({"f": Flat(torch.arange(12.0)[:], (3, 4), 0)}).tensors[0]
    assert whole.data.shape == (3, 4)


@pytest.mark.parametrize("leaf", [Flat(torch.ones(2, 2), (8,), 0), Flat(torch.ones(4), (8,), 5), Flat(torch.ones(4), (8,), -1)])
def test_flat_slices_that_do_not_fit(leaf: Flat) -> None:
    with pytest.raises(StateError, match="'a/f': Flat needs one-dimensional data"):
        capture({"a": {"f": leaf}})


def test_per_rank_tensors_and_values() -> None:
    captured = capture({"p": PerRank({"t": torch.ones(3), "v": 5, "l": [torch.zeros(1), 2]}), "n": 1})
    assert [(t.name, t.layout) for t in captured.tensors] == [("p/t", PerRankLayout((3,))), ("p/l/0", PerRankLayout((1,)))]
    assert captured.per_rank_values == {"p/v": 5, "p/l": Container.of("list", 2), "p/l/1": 2}
    assert captured.values == {"n": 1} and not captured.containers


def test_empty_entries_at_the_top_are_nothing() -> None:
    captured = capture({"experts": {}, "model": torch.nn.Sequential()})
    assert not captured.values and not captured.tensors


class Color(enum.IntEnum):
    RED = 1


@dataclasses.dataclass
class Config:
    lr: float = 0.1


Point = namedtuple("Point", "x y")


class Wrapped(torch.Tensor):
    pass


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


REFUSED: list[tuple[Any, str]] = [
    ({1, 2}, "sorted"),
    (frozenset((1,)), "sorted"),
    (np.arange(3), "torch.from_numpy"),
    (np.int64(3), ".item()"),
    (np.bool_(True), ".item()"),
    (bytearray(b"x"), "bytes"),
    (io.BytesIO(b"x"), "bytes"),
    (1j, "torch.tensor"),
    (Color.RED, ".value"),
    (Config(), "asdict"),
    (Point(1, 2), "_asdict"),
    (len, "name"),
    (Config, "name"),
    (object(), "state_dict"),
    (torch.Generator(), "get_state"),
    (torch.eye(2).to_sparse(), "indices"),
    (quantized(), "int_repr"),
    (Wrapped(torch.ones(2)), "plain tensors"),
    (torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged), "values()"),
    (torch.nn.LazyLinear(2).weight, "Run the model once"),
    (torch.ones(2, device="meta"), "to_empty"),
    (torch.empty(2, dtype=torch.bits8), "View or convert"),
    (defaultdict(set, {"x": {1}}), "sorted"),
]


@pytest.mark.parametrize(("leaf", "advice"), REFUSED, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("wrap", [lambda leaf: leaf, PerRank, lambda leaf: [torch.ones(1), leaf]], ids=["", "rank", "list"])
def test_refusals_name_the_path_and_say_what_to_use(leaf: Any, advice: str, wrap: Any) -> None:
    with pytest.raises(StateError, match=re.escape(advice)) as caught:
        capture({"top": {"a~b/c": wrap(leaf)}})
    assert "top/a~0b~1c" in caught.value.message
    assert isinstance(caught.value, UnsupportedLeaf) or advice == "to_empty"


def test_values_inside_values_are_refused_with_their_path() -> None:
    with pytest.raises(UnsupportedLeaf, match="'a/1/b'"):
        capture({"a": [1, {"b": object()}]})


def test_cycles_are_refused() -> None:
    mapping: dict[str, Any] = {}
    mapping["self"] = {"again": mapping}
    with pytest.raises(StateError, match="'a/self/again': the dict there holds itself"):
        capture({"a": mapping})
    items: list[Any] = [1]
    items.append(items)
    with pytest.raises(StateError, match="holds itself"):
        capture({"a": items})


def test_deep_states_are_refused() -> None:
    state: dict[str, Any] = {"x": torch.ones(1)}
    for _ in range(70):
        state = {"x": state}
    with pytest.raises(StateError, match="deeper than 64"):
        capture(state)


def test_names_that_collide_are_refused() -> None:
    with pytest.raises(DuplicateName, match=r"'a/1'.*1 and '1'"):
        capture({"a": {1: torch.ones(1), "1": 2}})


@pytest.mark.parametrize("state", [[torch.ones(1)], torch.ones(1), {1: 2}, None, torch.nn.Linear(1, 1)], ids=repr)
def test_the_state_has_to_be_a_mapping(state: Any) -> None:
    with pytest.raises(StateError, match="has to be a mapping with str keys"):
        capture(state)


def test_keys_that_cannot_be_printed_are_refused() -> None:
    with pytest.raises(StateError, match=r"key 'b\\n' under 'a'"):
        capture({"a": {"b\n": 1}})


@pytest.mark.parametrize("key", ["ключ", "a b", "日本", "a.b[0]", "~", "/", "😀", "..", "__metadata__"])
def test_all_printable_keys_are_fine(key: str) -> None:
    target: dict[str, Any] = {key: {key: torch.zeros(2)}, "v": {key: 0}}
    load(save({key: {key: torch.ones(2)}, "v": {key: 7}}), target)
    assert torch.equal(target[key][key], torch.ones(2)) and target["v"][key] == 7
