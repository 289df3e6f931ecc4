# SPDX-License-Identifier: Apache-2.0
"""Whatever is done to a parity record: it is a valid one, or `InvalidParity` is raised, and nothing else ever."""

from __future__ import annotations

import json
from random import Random

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardckpt.errors import InvalidParity
from shardckpt.manifest import encode_canonical, seal
from shardckpt.parity.layout import cut_parity
from shardckpt.parity.record import ParityRecord, build_parity, parse_parity
from shardckpt.validate import parse_manifest
from tests.hostile.base import good, resealed
from tests.hostile.mutate import mutate, mutate_text

CHECKPOINT = parse_manifest(good())


def record() -> bytes:
    """The record of one group of both ranks."""
    sizes = [file.size - file.data for file in CHECKPOINT.manifest.files]
    cuts = cut_parity(sizes, CHECKPOINT.manifest.block_size)
    blocks = CHECKPOINT.manifest.block_size
    slices = [(stop - start, b"12345678" * -(-(stop - start) // blocks)) for start, stop in cuts]
    return build_parity(CHECKPOINT, [[0, 1]], [slices])


RECORD = record()


def accepts(data: bytes) -> bool:
    """Whether a record is valid; raises what must not be raised."""
    try:
        parity = parse_parity(data, "", CHECKPOINT)
    except InvalidParity as error:
        assert str(error).isprintable()
        return False
    assert [rank for group in parity.record.groups for rank in group.ranks]
    assert len(parity.slices()) == len(parity.files)
    return True


def encoded(document: object) -> bytes:
    """A document with the right checksum, canonical where it fits the schema."""
    try:
        return seal(encode_canonical(msgspec.structs.replace(msgspec.convert(document, ParityRecord), checksum="")))
    except msgspec.ValidationError:
        return resealed(json.dumps(document, separators=(",", ":")).encode())


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.randoms(use_true_random=False), st.integers(1, 3))
def test_mutated_records(random: Random, times: int) -> None:
    document = json.loads(RECORD)
    for _ in range(times):
        mutate(document, random)
    accepts(encoded(document))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.randoms(use_true_random=False))
def test_mutated_text(random: Random) -> None:
    text = mutate_text(RECORD, random)
    assert accepts(text) is (text == RECORD)
    accepts(resealed(text))


def test_what_steers_a_terminal() -> None:
    data = resealed(RECORD.replace(b'{"format"', b'{"\\u001b[2J":1,"format"'))
    with pytest.raises(InvalidParity, match=r"unknown field `\\x1b\[2J`") as caught:
        parse_parity(data, "", CHECKPOINT)
    assert str(caught.value).isprintable()


def test_the_good_one_is_good() -> None:
    assert accepts(RECORD)
