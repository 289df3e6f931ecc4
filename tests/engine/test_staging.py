# SPDX-License-Identifier: Apache-2.0
"""A staged image is the data region of the rank's file, byte for byte, in whatever portions and by however many threads."""

from __future__ import annotations

import pytest
import torch

from shardckpt.buffer import Buffer
from shardckpt.device_staging import DeviceStaging
from shardckpt.errors import StorageFull
from shardckpt.events import Timings
from shardckpt.feed import Feed, Samples
from shardckpt.layout import ITEMSIZE, GlobalLayout, Mesh, MeshLayout, PerRankShapes, Replicate, Shard, StridedShard
from shardckpt.plan import Plan
from shardckpt.stage import FileData, FileMap
from shardckpt.staging import stage_at_once, stage_through_ring
from tests.engine.simulate import by_hand, local_tensors, random_tensors
from tests.engine.test_feed import digest, drain, drain_with_digests
from tests.engine.waiting import InThread, until_blocked

CHUNK = 64
"""Bytes; a multiple of all items' sizes."""
BLOCK = 16
SAMPLES: Samples = {"0:[]": {"whole": 5}}


def plan_of_all_kinds() -> Plan:
    """Whole, in windows, in boxes, strided, per rank, empty, 0-d, and of every dtype."""
    grid = Mesh((0, 1, 2, 3), (2, 2))
    everywhere = MeshLayout((6, 5), Mesh((0, 1, 2, 3), (4,)), (Replicate(),))
    tensors: dict[str, tuple[str, GlobalLayout, tuple[int, int]]] = {
        "whole": ("float32", everywhere, (1, 1)),
        "slices": ("float32", everywhere, (2, 4)),
        "rows": ("float64", MeshLayout((6, 50), grid, (Replicate(), Shard(0))), (1, 1)),
        "strided": ("float32", MeshLayout((9, 2), grid, (StridedShard(0, 2), Replicate())), (0, 1)),
        "scalar": ("float32", MeshLayout((), grid, (Replicate(), Replicate())), (3, 1)),
        "per rank": ("float32", PerRankShapes(((2,), None, (1, 3), ())), (0, 1)),
        "empty": ("float32", MeshLayout((0, 3), grid, (Shard(0), Shard(1))), (0, 1)),
    }
    boxes = MeshLayout((7, 3), grid, (Shard(0), Shard(1)))
    return by_hand(4, tensors | {f"of {name}": (name, boxes, (0, 1)) for name in ITEMSIZE if hasattr(torch, name)})


def transposed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same values, in memory that is not contiguous."""
    return {name: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}


PLAN = plan_of_all_kinds()
WHOLES = random_tensors(PLAN)


def data_of(rank: int, *, contiguous: bool = True) -> FileData:
    tensors = local_tensors(PLAN, rank, WHOLES)
    return FileData(FileMap(PLAN.file_pieces(rank)), tensors if contiguous else transposed(tensors))


def expected(rank: int) -> bytes:
    """The region, tensor by tensor."""
    tensors, pieces = local_tensors(PLAN, rank, WHOLES), PLAN.file_pieces(rank)
    region = bytearray(data_of(rank).nbytes)
    for piece in pieces:
        start, stop = piece.local
        values = tensors[piece.tensor.name].reshape(-1)[start:stop].clone()
        region[piece.offset : piece.offset + piece.nbytes] = values.view(torch.uint8).numpy().tobytes()
    return bytes(region)


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_at_once(rank: int, contiguous: bool, threads: int) -> None:
    data, timings = data_of(rank, contiguous=contiguous), Timings()
    feed = Feed(Buffer(-(-data.nbytes // CHUNK) * CHUNK), data.nbytes, CHUNK)
    stage_at_once(data, feed, DeviceStaging(), threads, timings)
    assert not feed.is_staged
    feed.staged(SAMPLES, timings.seconds)
    assert drain(feed, 2) == expected(rank)
    assert timings.bytes == {"stage": data.nbytes}


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_through_a_ring(rank: int, slots: int) -> None:
    data, timings = data_of(rank, contiguous=False), Timings()
    feed = Feed(Buffer(slots * CHUNK), data.nbytes, CHUNK)
    assert feed.is_ring
    writing = InThread(lambda: drain_with_digests(feed, 3))
    stage_through_ring(data, feed, BLOCK, lambda: SAMPLES, timings)
    chunks = writing.result()
    assert b"".join(chunk for chunk, _ in chunks) == expected(rank)
    assert [digests for _, digests in chunks] == [digest(memoryview(chunk)) for chunk, _ in chunks]
    assert feed.samples() == SAMPLES
    assert timings.bytes == {"stage": data.nbytes, "hash": data.nbytes}


def test_in_two_selections() -> None:
    """As lazy staging does it: together they are the whole."""
    data = data_of(0)
    feed = Feed(Buffer(-(-data.nbytes // CHUNK) * CHUNK), data.nbytes, CHUNK)
    later = {"whole", "rows", "of bfloat16"}
    stage_at_once(data, feed, DeviceStaging(), 2, Timings(), lambda name: name not in later)
    before = bytes(feed.memory.bytes[: data.nbytes])
    stage_at_once(data, feed, DeviceStaging(), 2, Timings(), lambda name: name in later)
    assert bytes(feed.memory.bytes[: data.nbytes]) == expected(0) != before


def test_nothing_to_stage() -> None:
    data = FileData(FileMap(()), {})
    feed = Feed(Buffer(CHUNK), data.nbytes, CHUNK)
    stage_at_once(data, feed, DeviceStaging(), 2, Timings())
    stage_through_ring(data, feed, BLOCK, dict, Timings())
    assert feed.is_staged
    assert drain(feed, 1) == b""


def test_samples_are_taken_when_all_is_copied() -> None:
    data = data_of(1)
    feed = Feed(Buffer(CHUNK), data.nbytes, CHUNK)
    filled: list[int] = []

    def sample() -> Samples:
        filled.append(len(feed._digests))
        return SAMPLES

    writing = InThread(lambda: drain(feed, 1))
    stage_through_ring(data, feed, BLOCK, sample, Timings())
    assert filled == [feed.chunks]
    writing.result()


def test_a_ring_whose_writer_fails() -> None:
    data = data_of(2)
    feed = Feed(Buffer(2 * CHUNK), data.nbytes, CHUNK)
    staging = InThread(lambda: stage_through_ring(data, feed, BLOCK, dict, Timings()))
    until_blocked(staging, Feed.room)
    feed.fail(StorageFull("no space"))
    assert isinstance(staging.error(), StorageFull)
