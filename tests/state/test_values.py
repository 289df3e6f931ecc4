# SPDX-License-Identifier: Apache-2.0
"""Values survive JSON exactly, and decoding refuses everything that encoding does not make."""

from __future__ import annotations

import collections
import json
import math
import struct
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.errors import InvalidManifest, UnsupportedLeaf
from shardckpt.manifest import DEPTH_LIMIT
from shardckpt.values import Container, decode_value, encode_value
from tests.state.memory import through_json

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(1 << 200), 1 << 200),
    st.floats(),
    st.text(st.characters()),
    st.binary(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.bool, torch.device("cpu"), torch.device("cuda", 1)]),
    st.lists(st.integers(0, 1 << 40)).map(torch.Size),
)
KEYS = st.one_of(st.text(st.characters()), st.integers(), st.booleans(), st.none(), st.binary(), st.tuples(st.integers()))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.text(st.characters()), inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(KEYS, st.integers(), max_size=4).map(collections.Counter),
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal in types and bits, also NaNs and signed zeros."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    if isinstance(a, dict):
        return len(a) == len(b) and all(any(same(key, other) and same(a[key], b[other]) for other in b) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@given(VALUES)
def test_round_trip(value: Any) -> None:
    assert same(through_json(value), value)
    data = msgspec.json.Encoder(order="deterministic").encode(encode_value(value))
    assert same(decode_value(msgspec.json.decode(data)), value)


@given(VALUES)
def test_encoding_is_canonical(value: Any) -> None:
    assert encode_value(decode_value(encode_value(value))) == encode_value(value)


@pytest.mark.parametrize(
    "value",
    [math.nan, -math.nan, struct.unpack(">d", bytes.fromhex("7ff8000000000001"))[0], math.inf, -math.inf, -0.0, 5e-324],
)
def test_floats_keep_their_bits(value: float) -> None:
    assert struct.pack(">d", through_json(value)) == struct.pack(">d", value)


def test_subclasses_become_what_they_are_subclasses_of() -> None:
    assert through_json(np.float64(0.1)) == 0.1
    assert type(through_json(np.float64(0.1))) is float
    assert type(through_json(np.str_("a"))) is str
    assert type(through_json(collections.OrderedDict(a=1))) is dict
    assert type(through_json(collections.defaultdict(int, {1: 2}))) is dict


def test_mappings_with_a_dollar_are_not_mistaken_for_tags() -> None:
    assert through_json({"$": "tuple", "v": []}) == {"$": "tuple", "v": []}


def test_containers_are_values_too() -> None:
    for container in (Container.of("list", 3), Container.of("tuple", 0), Container("dict", (1, None, "a", (2.5, b"x")))):
        assert through_json(container) == container


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def test_depth_is_limited_the_same_way_for_encoding_and_decoding() -> None:
    assert through_json(nested(DEPTH_LIMIT)) == nested(DEPTH_LIMIT)
    with pytest.raises(UnsupportedLeaf, match="deeper than 64"):
        encode_value(nested(DEPTH_LIMIT + 1), "a/b")
    with pytest.raises(InvalidManifest, match="deeper than 64"):
        decode_value(nested(DEPTH_LIMIT + 1), "a/b")


def test_refusal_names_the_place_inside_a_value() -> None:
    with pytest.raises(UnsupportedLeaf, match=r"'loader/seen/1/a': a set is not stored.*sorted"):
        encode_value([1, {"a": {2}}], "loader/seen")


HOSTILE: list[Any] = [
    {"$": "pickle", "v": "gASV"},
    {"$": "tuple"},
    {"$": "tuple", "v": 1},
    {"$": "tuple", "v": [], "w": 1},
    {"$": ["tuple"], "v": []},
    {"$": "bytes", "v": "=a="},
    {"$": "bytes", "v": "YQ==\n"},
    {"$": "bytes", "v": 3},
    {"$": "int", "v": "0x10"},
    {"$": "int", "v": "0x1_0000000000000000"},
    {"$": "int", "v": "12"},
    {"$": "float", "v": "1.5"},
    {"$": "float", "v": "Infinity"},
    {"$": "float", "v": "7ff8000000000000"},
    {"$": "str", "v": "YQA="},
    {"$": "dict", "v": [[1]]},
    {"$": "dict", "v": [[1, 2], [1, 3]]},
    {"$": "dict", "v": [[[1], 2]]},
    {"$": "dict", "v": [[{"$": "tuple", "v": [[1]]}, 2]]},
    {"$": "size", "v": [-1]},
    {"$": "size", "v": [True]},
    {"$": "size", "v": ["1"]},
    {"$": "dtype", "v": "load"},
    {"$": "dtype", "v": "nn.Module"},
    {"$": "dtype", "v": "half"},
    {"$": "device", "v": "nowhere"},
    {"$": "device", "v": "cuda:-5"},
    {"$": "container", "kind": "set", "v": []},
    {"$": "container", "kind": "list", "v": -1},
    {"$": "container", "kind": "list", "v": 1 << 60},
    {"$": "container", "kind": "list", "v": True},
    {"$": "container", "kind": "dict", "v": [1, 1]},
    {"$": "container", "kind": "dict", "v": [[1]]},
    {"$": "container", "v": []},
    1 << 63,
    math.inf,
    {"a": math.nan},
    {1: 2},
    b"bytes",
    {1, 2},
]


@pytest.mark.parametrize("data", HOSTILE, ids=repr)
def test_decoding_refuses(data: Any) -> None:
    with pytest.raises(InvalidManifest, match="invalid manifest: value 'where'"):
        decode_value(data, "where")


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.text(max_size=2), st.sampled_from(["$", "v", "kind"])), inner, max_size=3),
        st.tuples(
            st.sampled_from(["tuple", "dict", "counter", "int", "bytes", "size", "container", "float", "str", "dtype"]), inner
        ).map(lambda pair: {"$": pair[0], "v": pair[1]}),
    ),
    max_leaves=10,
)


@given(JSON)
def test_decoding_arbitrary_json_gives_a_value_or_its_own_error(data: Any) -> None:
    try:
        value = decode_value(data)
    except InvalidManifest:
        return
    assert json.dumps(encode_value(value), sort_keys=True) == json.dumps(data, sort_keys=True)
