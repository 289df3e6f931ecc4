# SPDX-License-Identifier: Apache-2.0
"""Whatever is done to a manifest: it is a valid one, or `InvalidManifest` is raised, and nothing else ever."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import shardckpt
from shardckpt.checksum import block_digests, digest, encode_digests
from shardckpt.errors import CheckpointError, InvalidManifest
from shardckpt.manifest import MANIFEST_NAME, rank_file_name
from shardckpt.validate import parse_manifest
from shardckpt.values import decode_value, encode_value
from tests.hostile.base import ATTEMPT, encoded, examine, good, resealed
from tests.hostile.greedy import tiny
from tests.hostile.mutate import TAGGED, mutate, mutate_text

TEXT_TAGS = ["int", "float", "bytes", "str", "dtype", "device"]
EXAMPLES = int(os.environ.get("SHARDCKPT_HOSTILE_EXAMPLES", "600"))
"""Mutants per property; more where there is time."""
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""On a busy machine all is slow."""


def accepts(data: bytes) -> bool:
    """Whether a manifest is valid; raises what must not be raised."""
    try:
        checkpoint = examine(data)
    except InvalidManifest as error:
        assert str(error).isprintable()
        return False
    # what is valid stands for itself, byte by byte
    assert parse_manifest(data).manifest == checkpoint.manifest
    return True


@settings(PATIENT, max_examples=EXAMPLES)
@given(st.randoms(use_true_random=False), st.integers(1, 4))
def test_mutated_documents(random: Random, times: int) -> None:
    document = json.loads(good())
    for _ in range(times):
        mutate(document, random)
    accepts(encoded(document))


@settings(PATIENT, max_examples=EXAMPLES)
@given(st.randoms(use_true_random=False))
def test_mutated_text(random: Random) -> None:
    text = mutate_text(good(), random)
    assert accepts(text) is (text == good())
    accepts(resealed(text))


@settings(PATIENT, max_examples=100)
@given(st.binary(max_size=200))
@example(b"")
@example(b'"}')
def test_any_bytes(data: bytes) -> None:
    assert not accepts(data)
    assert not accepts(resealed(data))


def json_values() -> st.SearchStrategy[Any]:
    numbers = st.integers(-(1 << 65), 1 << 65) | st.floats(allow_nan=False, allow_infinity=False)
    leaves = st.none() | st.booleans() | numbers | st.text() | st.sampled_from(TAGGED)
    tags = st.sampled_from([*TEXT_TAGS, "tuple", "size", "dict", "counter", "container", "list"])

    def grow(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        tagged = st.fixed_dictionaries({"$": tags | inner, "v": inner})
        pairs = st.fixed_dictionaries({"$": tags, "v": st.lists(st.lists(inner, min_size=2, max_size=2))})
        return st.lists(inner) | st.dictionaries(st.text() | st.just("$"), inner) | tagged | pairs

    return st.recursive(leaves, grow, max_leaves=12)


@pytest.mark.slow
@settings(PATIENT, max_examples=EXAMPLES)
@given(json_values())
def test_values_decode_to_what_encodes_to_them(data: Any) -> None:
    try:
        value = decode_value(data, "x")
    except InvalidManifest:
        return
    assert encode_value(value) == data


@settings(PATIENT, max_examples=EXAMPLES)
@given(st.sampled_from(TEXT_TAGS), st.text(max_size=40))
@example("dtype", "_dynamo")
@example("device", "cuda:0000000000000000000000000000000000000000001")
def test_tagged_texts(tag: str, text: str) -> None:
    try:
        value = decode_value({"$": tag, "v": text}, "x")
    except InvalidManifest:
        return
    assert encode_value(value) == {"$": tag, "v": text}


# ---- whole checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one process with something of everything; its manifest is to be replaced."""
    place = tmp_path_factory.mktemp("saved")
    layers = [torch.nn.Linear(3, 2), torch.ones(2)]
    state = {"layers": layers, "tied": layers[1], "x": (1, b"y", float("nan")), "own": shardckpt.PerRank({"seed": 3})}
    shardckpt.save(place, state, metadata={"a": [1, 2]})
    return place


def test_checkpoints_with_mutated_manifests_load_or_say_why_not(saved: Path) -> None:
    path = saved / MANIFEST_NAME
    text = path.read_bytes()
    outcomes = {"loaded": 0, "refused": 0}
    number = itertools.count()

    @settings(PATIENT, max_examples=EXAMPLES // 4)
    @given(st.randoms(use_true_random=False), st.integers(1, 3))
    def load_mutant(random: Random, times: int) -> None:
        next(number)
        document = json.loads(text)
        for _ in range(times):
            mutate(document, random)
        path.write_bytes(encoded(document))
        try:
            shardckpt.load(saved)
        except CheckpointError as error:
            assert str(error).isprintable()
            outcomes["refused"] += 1
        else:
            outcomes["loaded"] += 1

    load_mutant()
    path.write_bytes(text)
    assert shardckpt.load(saved).state["x"][:2] == (1, b"y")
    assert sum(outcomes.values()) == next(number)
    print(outcomes)


# ---- values in rank files


def checkpoint_of_value(path: Path, text: bytes) -> Path:
    """A checkpoint whose one rank has saved ``text`` as its value, with all digests as they should be."""
    path.mkdir(exist_ok=True)
    header = bytes(4096)
    manifest = json.loads(tiny({"v": {"dtype": "uint8", "per_rank": [[len(text)]], "value": True}}, len(text)))
    digests = encode_digests(block_digests(memoryview(text), manifest["block_size"]))
    manifest["files"][0].update(header=digest(header).hex(), digests=digests)
    (path / MANIFEST_NAME).write_bytes(encoded(manifest))
    (path / rank_file_name(0, ATTEMPT)).write_bytes(header + text)
    return path


VALUES: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"\x80\x04K\x01.",
    "not UTF-8": b'"\xff"',
    "NaN": b"NaN",
    "1e999": b"1e999",
    "5000 digits": b"9" * 5000,
    "65 bits": b"36893488147419103232",
    "more behind": b"1 2",
    "half a pair": b'"\\ud800"',
    "100 levels": b"[" * 100 + b"]" * 100,
    "100,000 levels": b"[" * 100_000 + b"]" * 100_000,
    "an unknown tag": b'{"$":"pickle","v":""}',
    "a function of torch": b'{"$":"dtype","v":"load"}',
    "a key that is a list": b'{"$":"dict","v":[[[],1]]}',
}


@pytest.mark.parametrize("text", VALUES.values(), ids=VALUES)
def test_hostile_values_in_rank_files(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(InvalidManifest) as caught:
        shardckpt.load(checkpoint_of_value(tmp_path / "x", text))
    assert "'v'" in str(caught.value)


def test_good_values_in_rank_files(tmp_path: Path) -> None:
    path = checkpoint_of_value(tmp_path / "x", b'{"a":[1,{"$":"tuple","v":[2]}]}')
    assert shardckpt.load(path).state == {"v": {0: {"a": [1, (2,)]}}}
