# SPDX-License-Identifier: Apache-2.0
"""The content of benchmarks: any misplaced, missing or changed element is found."""

from __future__ import annotations

import pytest
import torch

from shardckpt.bench.content import count_wrong, fill, poison


def whole(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    data = torch.empty(shape)
    fill(name, data, shape, (0,) * len(shape))
    return data


@pytest.mark.parametrize("shape", [(), (1,), (7,), (700_000,), (30, 17), (3, 5, 7), (2, 300_000)])
def test_what_was_filled_is_right(shape: tuple[int, ...]) -> None:
    assert count_wrong("a", whole("a", shape), shape, (0,) * len(shape)) == 0


@pytest.mark.parametrize(
    ("rows", "columns"), [((0, 30), (0, 17)), ((4, 9), (0, 17)), ((0, 30), (5, 6)), ((29, 30), (16, 17)), ((3, 3), (0, 17))]
)
def test_a_part_has_the_content_of_its_place(rows: tuple[int, int], columns: tuple[int, int]) -> None:
    data = whole("a", (30, 17))[rows[0] : rows[1], columns[0] : columns[1]]
    offset = (rows[0], columns[0])
    assert count_wrong("a", data, (30, 17), offset) == 0
    assert count_wrong("a", data.clone(), (30, 17), offset) == 0
    refilled = torch.empty_like(data)
    fill("a", refilled, (30, 17), offset)
    assert refilled.numpy().tobytes() == data.numpy().tobytes()


def test_names_and_places_have_content_of_their_own() -> None:
    data = whole("a", (64, 64))
    assert count_wrong("b", data, (64, 64), (0, 0)) == 64 * 64
    assert count_wrong("a", data[:32], (64, 64), (32, 0)) == 32 * 64
    assert count_wrong("a", data.T.contiguous(), (64, 64), (0, 0)) == 64 * 63


def test_one_flipped_bit_is_found() -> None:
    data = whole("a", (300_000,))
    data.view(torch.int32)[299_999] ^= 1
    assert count_wrong("a", data, (300_000,), (0,)) == 1


def test_poison_leaves_nothing_right() -> None:
    data = whole("a", (1000,))
    poison(data)
    assert count_wrong("a", data, (1000,), (0,)) == 1000


def test_only_float32() -> None:
    with pytest.raises(TypeError, match="float32"):
        fill("a", torch.empty(3, dtype=torch.int64), (3,), (0,))
