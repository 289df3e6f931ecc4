# SPDX-License-Identifier: Apache-2.0
"""Sizes and shapes of what is benchmarked, and what benchmarks refuse to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from shardckpt import ConfigError
from shardckpt.bench import AsyncSpec, LoadSpec, PlanSpec, ReshardSpec, SaveSpec, parse_size
from shardckpt.bench.shapes import BYTES_PER_PARAMETER, GPTShape, count_parameters


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("2.9GB", 2_900_000_000), ("200 MB", 200_000_000), ("1gib", 1 << 30), ("512", 512), ("7b", 7), ("1.5kb", 1500)],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1 parsec", "1ib", "1e9", "1.GB", "٣GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="size"):
        parse_size(text)


@pytest.mark.parametrize("nbytes", [1_000_000, 50_000_000, 2_900_000_000, 10**12])
def test_a_gpt_has_the_size_that_was_asked_for(nbytes: int) -> None:
    shape = GPTShape.of_size(nbytes)
    assert 0 <= nbytes - shape.parameters * BYTES_PER_PARAMETER < (shape.width + 1) * BYTES_PER_PARAMETER
    assert shape.layers >= 8
    assert shape.vocabulary > 0


def test_a_llama_has_the_published_number_of_parameters() -> None:
    assert count_parameters("llama-8b") == 8_030_261_248
    assert count_parameters("llama-70b") == 70_553_706_496


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: SaveSpec(nbytes=1000), "too small"),
        (lambda: SaveSpec(ranks=0), "ranks=0"),
        (lambda: SaveSpec(rounds=-1), "rounds=-1"),
        (lambda: LoadSpec(caches=()), "caches"),
        (lambda: LoadSpec(nbytes=1000), "too small"),
        (lambda: ReshardSpec(to_ranks=()), "to_ranks"),
        (lambda: ReshardSpec(to_ranks=(4, 0)), "to_ranks=0"),
        (lambda: ReshardSpec(dims=(2,)), "dims"),
        (lambda: ReshardSpec(dims=(1,), to_ranks=(3,)), "evenly"),
        (lambda: AsyncSpec(nbytes=1000), "too small"),
        (lambda: AsyncSpec(steps=0), "steps=0"),
        (lambda: AsyncSpec(saves=0), "saves=0"),
        (lambda: AsyncSpec(samples=0), "samples=0"),
        (lambda: AsyncSpec(device="tpu"), "device='tpu'"),  # type: ignore[arg-type]
        (lambda: PlanSpec(model="llama-1t"), "llama-1t"),
        (lambda: PlanSpec(ranks=0), "ranks=0"),
        (lambda: PlanSpec(peer_ranks=-1), "peer_ranks"),
    ],
)
def test_what_cannot_be_measured(make: Callable[[], Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        make()
