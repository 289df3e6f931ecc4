# SPDX-License-Identifier: Apache-2.0
"""Copies from a GPU: exact, in few transfers, in order, and with little memory. A stream is played by a list of work to do."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch

from shardckpt.buffer import Buffer
from shardckpt.gpu.copies import DeviceCopier, PendingCopies
from shardckpt.gpu.pinning import pin, unpin
from shardckpt.stage import gather
from tests.gpu.streams import Lazy

CPU = torch.device("cpu")
KIB = 1 << 10


def copier_on(stream: Lazy, scratch: int = 64 * KIB, small: int = 8 * KIB) -> DeviceCopier:
    return DeviceCopier(CPU, stream, scratch=scratch, small=small)


def tensors_of_all_kinds() -> list[torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(100, 60)
    return [
        torch.tensor(3.0),
        torch.randn(7),
        base,
        base.t(),
        base[::2, 1:],
        base[3:50],
        torch.randn(5, 4, 300).transpose(0, 2),
        torch.randn(30, dtype=torch.complex64),
        torch.arange(9, dtype=torch.int8),
        torch.tensor([True, False, True]),
        torch.randn(40, 40).to(torch.bfloat16),
        torch.randn(64, 1)[:, 0],
        torch.empty(0, 3),
        torch.randn(1, 1).as_strided((1, 1), (5, 9)),
        torch.randn(9).requires_grad_(),
    ]


def copy_all(copier: DeviceCopier, tensors: list[torch.Tensor], image: torch.Tensor, gap: int = 0) -> PendingCopies:
    """All tensors behind each other, each as a head and a tail, with a gap after every third."""
    position = 0
    copier.begin()
    for at, tensor in enumerate(tensors):
        size, middle = tensor.element_size(), tensor.numel() // 3
        copier.copy(tensor, 0, middle, image, position)
        copier.copy(tensor, middle, tensor.numel(), image, position + middle * size)
        position += tensor.numel() * size + (gap if at % 3 == 2 else 0)
    return copier.finish()


def expected(tensors: list[torch.Tensor], nbytes: int, gap: int = 0) -> torch.Tensor:
    """The same by way of the CPU's own copies."""
    buffer = Buffer(nbytes)
    position = 0
    for at, tensor in enumerate(tensors):
        part = Buffer(max(1, tensor.numel() * tensor.element_size()))
        gather(tensor, 0, tensor.numel(), part, 0)
        nbytes = tensor.numel() * tensor.element_size()
        buffer.tensor[position : position + nbytes] = part.tensor[:nbytes]
        position += nbytes + (gap if at % 3 == 2 else 0)
    return buffer.tensor


@pytest.mark.parametrize("gap", [0, 24])
@pytest.mark.parametrize(("scratch", "small"), [(64, 16), (4 * KIB, 1 * KIB), (1 << 20, 1 << 20), (64 * KIB, 0)])
def test_every_kind_of_tensor_is_copied_exactly(scratch: int, small: int, gap: int) -> None:
    tensors = tensors_of_all_kinds()
    image = torch.zeros(200 * KIB, dtype=torch.uint8)
    copy_all(copier_on(Lazy(), scratch, small), tensors, image, gap).synchronize()
    assert torch.equal(image, expected(tensors, 200 * KIB, gap))


def test_ten_thousand_steps_are_one_transfer() -> None:
    stream = Lazy()
    copier = copier_on(stream)
    steps = [torch.tensor(float(at)) for at in range(10_000)]
    image = torch.empty(40_000, dtype=torch.uint8)
    copier.begin()
    for at, step in enumerate(steps):
        copier.copy(step, 0, 1, image, 4 * at)
    copier.finish().synchronize()
    assert stream.log == ["follow", "gather", "to host", "mark"]
    assert torch.equal(image.view(torch.float32), torch.arange(10_000.0))


def test_large_parts_go_straight_and_do_not_split_a_batch() -> None:
    stream = Lazy()
    copier = copier_on(stream)
    sizes = [4, 4, 10_000, 4, 4]
    starts = [0, *accumulate(sizes)]
    image = torch.empty(4 * starts[-1], dtype=torch.uint8)
    copier.begin()
    for start, size in zip(starts, sizes, strict=False):
        copier.copy(torch.arange(start, start + size, dtype=torch.int32), 0, size, image, 4 * start)
    copier.finish().synchronize()
    # the large one, then all small ones put together, which leave in two runs
    assert stream.log == ["follow", "to host", "gather", "to host", "to host", "mark"]
    assert torch.equal(image.view(torch.int32), torch.arange(starts[-1], dtype=torch.int32))


def test_parts_for_several_places_are_put_together() -> None:
    stream = Lazy()
    copier = copier_on(stream)
    images = [torch.empty(8, dtype=torch.uint8) for _ in range(3)]
    copier.begin()
    for at, image in enumerate(images):
        copier.copy(torch.tensor([at, -at], dtype=torch.int32), 0, 2, image, 0)
    copier.finish().synchronize()
    assert stream.log.count("gather") == 1
    assert [image.view(torch.int32).tolist() for image in images] == [[0, 0], [1, -1], [2, -2]]


def test_scratch_memory_is_bounded_and_kept_from_save_to_save() -> None:
    stream = Lazy()
    copier = copier_on(stream, scratch=16 * KIB)
    tensors = tensors_of_all_kinds() * 3
    image = torch.zeros(600 * KIB, dtype=torch.uint8)
    for _ in range(3):
        copy_all(copier, tensors, image).synchronize()
    assert stream.allocated == 16 * KIB
    assert torch.equal(image, expected(tensors, 600 * KIB))
    copier.close()
    copy_all(copier, tensors, image).synchronize()
    assert stream.allocated == 32 * KIB


def test_a_gpu_that_is_nearly_full_gets_by_with_less() -> None:
    stream = Lazy(memory=3 << 20)
    copier = DeviceCopier(CPU, stream, small=2 << 20)
    tensors = [torch.randn(300_000), torch.randn(2, 400_000).t(), torch.randn(100)]
    image = torch.zeros(8 << 20, dtype=torch.uint8)
    copy_all(copier, tensors, image).synchronize()
    assert stream.allocated == 2 << 20
    assert torch.equal(image, expected(tensors, 8 << 20))


def test_a_small_part_that_is_larger_than_what_a_full_gpu_has_left() -> None:
    stream = Lazy(memory=1 << 20)
    tensors = [torch.randn(10), torch.randn(900_000), torch.randn(10)]
    image = torch.zeros(4 << 20, dtype=torch.uint8)
    copy_all(DeviceCopier(CPU, stream, small=3 << 20), tensors, image).synchronize()
    assert stream.allocated == 1 << 20
    assert torch.equal(image, expected(tensors, 4 << 20))


def test_a_gpu_that_is_full_says_so() -> None:
    copier = DeviceCopier(CPU, Lazy(memory=1 << 10))
    copier.begin()
    with pytest.raises(torch.OutOfMemoryError):
        copier.copy(torch.ones(3), 0, 3, torch.empty(12, dtype=torch.uint8), 0)


class Eager(Lazy):
    """A stream that does its work at once, and forgets it."""

    def enqueue(self, work: Callable[[], Any]) -> None:
        work()


@pytest.mark.parametrize("is_strided", [False, True])
def test_memory_of_sources_lives_until_the_copies_are_known_to_be_done(is_strided: bool) -> None:
    copier = copier_on(Eager())
    memory = np.ones((3, 3), dtype=np.float32)
    alive = weakref.ref(memory)
    source = torch.from_numpy(memory.T if is_strided else memory)
    del memory
    image = torch.empty(36, dtype=torch.uint8)
    copier.begin()
    copier.copy(source, 0, 9, image, 0)
    pending = copier.finish()
    source.data = torch.zeros(3, 3)
    gc.collect()
    assert alive() is not None
    pending.synchronize()
    gc.collect()
    assert alive() is None


def test_copies_take_values_no_earlier_than_the_stream_gets_to_them() -> None:
    """What makes waiting necessary, and the test of exactness below one that can fail."""
    stream = Lazy()
    copier = copier_on(stream)
    image = torch.empty(12, dtype=torch.uint8)
    source = torch.ones(3)
    copier.begin()
    copier.copy(source, 0, 3, image, 0)
    pending = copier.finish()
    pending.wait_on_current_stream()
    assert stream.log == ["follow", "gather", "to host", "mark", "wait"]
    source.add_(1)
    pending.synchronize()
    assert image.view(torch.float32).tolist() == [2.0] * 3


# ---- on a GPU


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("locked", [True, False], ids=["page-locked", "pageable"])
def test_a_gpu_copies_every_kind_of_tensor_exactly(locked: bool) -> None:
    tensors = [tensor.detach().cuda() for tensor in tensors_of_all_kinds()]
    tensors[3:6] = [tensors[2].t(), tensors[2][::2, 1:], tensors[2][3:50]]
    buffer = Buffer(200 * KIB)
    if locked:
        assert pin(buffer.tensor.data_ptr(), buffer.tensor.numel(), "always")
    copy_all(DeviceCopier(torch.device("cuda", 0), small=KIB), tensors, buffer.tensor).synchronize()
    assert torch.equal(buffer.tensor, expected([tensor.cpu() for tensor in tensors], 200 * KIB))
    if locked:
        unpin(buffer.tensor.data_ptr())


@needs_cuda
def test_a_snapshot_is_exact_while_the_current_stream_goes_on_changing_everything() -> None:
    device = torch.device("cuda", 0)
    tensors = [torch.zeros(1 << 22, device=device), *(torch.zeros((), device=device) for _ in range(1000))]
    tensors.append(torch.zeros(2048, 1024, device=device).t())
    nbytes = sum(tensor.numel() * 4 for tensor in tensors)
    buffer = Buffer(nbytes)
    assert pin(buffer.tensor.data_ptr(), nbytes, "always")
    copier = DeviceCopier(device)
    for step in range(20):
        # work that is still queued when the copies are asked for: they have to come after it
        for _ in range(5):
            torch._foreach_add_(tensors, 0.2)
        wanted = [tensor.clone() for tensor in tensors]
        copier.begin()
        position = 0
        for tensor in tensors:
            copier.copy(tensor, 0, tensor.numel(), buffer.tensor, position)
            position += tensor.numel() * 4
        pending = copier.finish()
        pending.wait_on_current_stream()
        torch._foreach_mul_(tensors, float(step + 2))
        for tensor in tensors[1:1001:7]:
            tensor.data = torch.full((), -1.0, device=device)
        pending.synchronize()
        snapshot = torch.cat([tensor.reshape(-1) for tensor in wanted]).cpu()
        assert torch.equal(buffer.tensor.view(torch.float32), snapshot)
    unpin(buffer.tensor.data_ptr())
