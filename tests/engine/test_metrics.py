# SPDX-License-Identifier: Apache-2.0
"""Metrics of a save in the manifest: exact to the microsecond, small, and refused when they cannot be."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.errors import InvalidManifest
from shardckpt.events import PHASES, Phase
from shardckpt.manifest import Manifest, MetricsRecord, encode_canonical, encode_manifest
from shardckpt.metrics import RECORDED, decode_columns, encode_columns
from shardckpt.store import MemoryStore
from shardckpt.validate import parse_manifest
from tests.engine.simulate import by_hand, resealed, save

WORLD = 3
seconds_of_a_rank = st.dictionaries(st.sampled_from(PHASES), st.integers(0, (1 << 32) - 1).map(lambda n: n / 1e6))


@lru_cache
def manifest_of(world_size: int) -> bytes:
    """A good manifest of no tensors."""
    return save(MemoryStore(f"metrics-{world_size}"), by_hand(world_size, {})).manifest


def manifest_with(metrics: Any, world_size: int = WORLD) -> bytes:
    """The same with these metrics."""
    document = msgspec.json.decode(manifest_of(world_size)) | {"metrics": metrics}
    try:
        return encode_manifest(msgspec.convert(document, Manifest))
    except msgspec.ValidationError:
        document["checksum"] = document.pop("checksum")
        return resealed(msgspec.json.encode(document))


@given(st.lists(seconds_of_a_rank, min_size=1, max_size=9))
def test_what_ranks_measured_comes_back(by_rank: list[Mapping[Phase, float]]) -> None:
    record = encode_columns(by_rank)
    met = [phase for phase in RECORDED if any(phase in of_rank for of_rank in by_rank)]
    if "receipts" in met and "receipts" not in by_rank[0]:
        met.remove("receipts")
    if record is None:
        assert not met
        return
    found = decode_columns(record, len(by_rank))
    assert list(found) == met
    for phase, column in found.items():
        told = by_rank[:1] if phase == "receipts" else by_rank
        assert [round(seconds * 1e6) for seconds in column] == [round(of_rank.get(phase, 0) * 1e6) for of_rank in told]


@given(st.lists(seconds_of_a_rank, min_size=1, max_size=9))
def test_a_manifest_with_metrics_is_a_manifest(by_rank: list[Mapping[Phase, float]]) -> None:
    record = encode_columns(by_rank)
    if record is not None:
        assert parse_manifest(manifest_with(msgspec.to_builtins(record), len(by_rank))).manifest.metrics == record


def test_times_beyond_the_bounds_count_as_the_bounds() -> None:
    record = encode_columns([{"write": 1e9}, {"write": -1e-9}])
    assert record is not None
    assert decode_columns(record, 2)["write"].tolist() == [((1 << 32) - 1) / 1e6, 0.0]


def test_the_commit_is_not_over_when_the_manifest_is_written() -> None:
    assert RECORDED == ("capture", "exchange", "plan", "stage", "hash", "write", "fsync", "readback", "receipts")
    assert encode_columns([{"commit": 1.0, "read": 1.0}]) is None


def test_metrics_of_a_large_job_are_small() -> None:
    """However long it all took."""
    record = encode_columns([dict.fromkeys(RECORDED, 1234.567891)] * 16384)
    assert len(encode_canonical(record)) < 700_000


def column(*microseconds: int) -> str:
    return base64.b64encode(struct.pack(f">{len(microseconds)}I", *microseconds)).decode()


GOOD = {"write": column(1, 2, 3), "receipts": column(7)}
BAD: dict[str, tuple[Any, str]] = {
    "a list": ([], "Expected `object"),
    "no phases": ({"microseconds": {}}, "metrics: without any phase"),
    "nothing": ({}, "missing required field `microseconds`"),
    "more": ({"microseconds": GOOD, "seconds": 1}, "unknown field `seconds`"),
    "an unknown phase": ({"microseconds": GOOD | {"sleep": column(1, 2, 3)}}, "Invalid enum value 'sleep'"),
    "a phase of loads": ({"microseconds": GOOD | {"read": column(1, 2, 3)}}, r"phases that manifests do not have: \['read'\]"),
    "the commit": ({"microseconds": GOOD | {"commit": column(1)}}, r"do not have: \['commit'\]"),
    "numbers": ({"microseconds": {"write": [1, 2, 3]}}, "Expected `str`"),
    "a rank missing": (
        {"microseconds": {"write": column(1, 2)}},
        "metrics of 'write': 8 bytes where 12 are needed",
    ),
    "a rank too many": ({"microseconds": {"write": column(1, 2, 3, 4)}}, "16 bytes where 12"),
    "receipts of all": ({"microseconds": {"receipts": column(1, 2, 3)}}, "12 bytes where 4"),
    "part of a number": ({"microseconds": {"write": base64.b64encode(b"0123456789a").decode()}}, "11 bytes where 12"),
    "no base64": ({"microseconds": {"write": "AAAAAAAAAAAAAAA!"}}, "metrics of 'write': not base64"),
    "no ASCII": ({"microseconds": {"write": "é" * 16}}, "not base64"),
    "stray bits": ({"microseconds": {"receipts": "AAAAAB=="}}, "base64 with bits that mean nothing"),
    "much": ({"microseconds": {"write": "A" * (1 << 20)}}, "786432 bytes where 12"),
}


def test_the_good_one_is_good() -> None:
    manifest = parse_manifest(manifest_with({"microseconds": GOOD})).manifest
    assert manifest.metrics == MetricsRecord(GOOD)  # type: ignore[arg-type]


@pytest.mark.parametrize(("metrics", "message"), BAD.values(), ids=BAD)
def test_metrics_that_cannot_be_are_refused(metrics: Any, message: str) -> None:
    with pytest.raises(InvalidManifest, match=message):
        parse_manifest(manifest_with(metrics))
