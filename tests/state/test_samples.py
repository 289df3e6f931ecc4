# SPDX-License-Identifier: Apache-2.0
"""Sample digests: equal for equal tensors, sensitive to what replicas would differ in."""

from __future__ import annotations

import pytest
import torch
import xxhash

from shardckpt.adapters.dtypes import dtype_name, dtype_named
from shardckpt.describe import sample_digest, sample_digests
from shardckpt.layout import ITEMSIZE

DTYPES = [dtype_named(name) for name in ITEMSIZE if hasattr(torch, name)]


def random_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    if dtype == torch.bool:
        raw &= 1
    return raw.view(dtype).view(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,), (65,), (40, 30)], ids=str)
def test_small_tensors_count_whole_and_large_ones_in_samples(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = random_bits(dtype, *shape)
    assert sample_digest(tensor) == sample_digest(tensor)
    raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    if dtype.itemsize * 64 >= len(raw) and dtype != torch.complex128:
        assert sample_digest(tensor) == xxhash.xxh3_64_intdigest(raw)


def test_strides_do_not_matter() -> None:
    tensor = torch.randn(40, 30)
    assert sample_digest(tensor.t().contiguous().t()) == sample_digest(tensor)
    assert sample_digest(torch.ones(1, 5).expand(50, 5)) == sample_digest(torch.ones(50, 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("count", [1, 20, 32, 33, 63, 64, 65, 5000])
def test_what_is_read_from_memory_is_what_torch_would_take(dtype: torch.dtype, count: int) -> None:
    tensor = random_bits(dtype, count)
    apart = tensor.new_zeros(count, 2)[:, 0]
    apart.copy_(tensor)
    assert sample_digest(apart) == sample_digest(tensor)


def test_the_first_and_last_element_count() -> None:
    tensor = torch.zeros(1000, 7)
    before = sample_digest(tensor)
    for index in ((0, 0), (-1, -1)):
        other = tensor.clone()
        other[index] = 1.0
        assert sample_digest(other) != before


def test_a_shift_is_found() -> None:
    assert sample_digest(torch.arange(100_000.0)) != sample_digest(torch.arange(100_000.0) + 1)


def test_signed_zeros_and_nans_are_told_apart() -> None:
    assert sample_digest(torch.tensor([0.0])) != sample_digest(torch.tensor([-0.0]))
    assert sample_digest(torch.tensor([torch.nan])) == sample_digest(torch.tensor([torch.nan]))


def test_many_at_once() -> None:
    tensors = [torch.randn(9, 9), torch.zeros(0), torch.arange(5), torch.randn(3, dtype=torch.float64), torch.tensor(True)]
    assert sample_digests(tensors) == [sample_digest(tensor) for tensor in tensors]
    assert sample_digests([]) == []
