# SPDX-License-Identifier: Apache-2.0
"""Reading: nothing reaches a target before its digest was checked, and damage is named by file, tensor and bytes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from shardckpt.errors import ChecksumMismatch, MissingFile, TruncatedFile
from shardckpt.layout import Mesh, MeshLayout, Piece, Replicate, Shard, intersect
from shardckpt.manifest import HEADER_ALIGNMENT
from shardckpt.plan import Plan
from shardckpt.read import CheckpointFiles, Chunk, Destination, cut_chunks, place, put, read_into
from shardckpt.reshard import FileReads, Want, plan_reads
from shardckpt.store import LocalStore
from tests.engine.simulate import Simulated, by_hand, part, same_bits, save

LINE2 = Mesh((0, 1), (2,))
SIZE = 300_000


def plan() -> Plan:
    return by_hand(
        2,
        {
            "a": ("float32", MeshLayout((SIZE,), LINE2, (Shard(0),)), (0, 1)),
            "b": ("uint8", MeshLayout((SIZE,), LINE2, (Replicate(),)), (0, 2)),
        },
    )


@pytest.fixture
def saved(tmp_path: Path) -> Simulated:
    return save(LocalStore(tmp_path), plan())


def file_of(saved: Simulated, rank: int) -> Path:
    return Path(saved.store.url) / saved.checkpoint.manifest.files[rank].name


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def whole(name: str) -> tuple[str, Piece, None]:
    return name, Piece.box((0,), (SIZE,)), None


@pytest.mark.parametrize("at", [0, 1, 65_535, 65_536, 599_999])
def test_a_flipped_bit_is_named(saved: Simulated, at: int) -> None:
    flip(file_of(saved, 1), HEADER_ALIGNMENT + at)
    with pytest.raises(ChecksumMismatch, match="restore another step") as caught:
        saved.load([whole("a")])
    assert caught.value.name == file_of(saved, 1).name
    assert caught.value.start <= HEADER_ALIGNMENT + at < caught.value.stop
    assert "a" in caught.value.tensors
    assert caught.value.stop - caught.value.start <= saved.checkpoint.plan.block_size


def test_damage_elsewhere_does_not_matter(saved: Simulated) -> None:
    """Only what is wanted is read; and the header is not a source."""
    flip(file_of(saved, 0), HEADER_ALIGNMENT + 4 * SIZE // 2 + SIZE // 4)
    flip(file_of(saved, 1), 100)
    (loaded,) = saved.load([("a", Piece.box((0,), (100_000,)), None)])
    assert same_bits(loaded, saved.wholes["a", None][:100_000])
    with pytest.raises(ChecksumMismatch) as caught:
        saved.load([whole("b")])
    assert caught.value.tensors == ["b"]


def test_nothing_of_a_damaged_block_is_placed(saved: Simulated) -> None:
    flip(file_of(saved, 0), HEADER_ALIGNMENT)
    tensor = saved.checkpoint.plan.by_name["a"]
    want = Want(0, tensor, Piece.box((0,), (SIZE,)))
    target = torch.full((SIZE,), 7.0)
    with pytest.raises(ChecksumMismatch):
        saved.load_into([want], {0: Destination(target, want.piece)})
    block = saved.checkpoint.plan.block_size // 4
    assert (target[:block] == 7.0).all()


@pytest.mark.parametrize("change", [-1, +1])
def test_a_file_of_another_length_is_named(saved: Simulated, change: int) -> None:
    path = file_of(saved, 1)
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"x")
    with pytest.raises(TruncatedFile, match="restore another step") as caught:
        saved.load([whole("a")])
    assert (caught.value.name, caught.value.wanted, caught.value.got) == (path.name, len(data), len(data) + change)


def test_a_missing_file_is_named(saved: Simulated) -> None:
    file_of(saved, 1).unlink()
    with pytest.raises(MissingFile, match="the manifest names it as the file of rank 1") as caught:
        saved.load([whole("a")])
    assert caught.value.rank == 1
    (loaded,) = saved.load([("a", Piece.box((0,), (SIZE // 2,)), None)])
    assert same_bits(loaded, saved.wholes["a", None][: SIZE // 2])


def test_swapped_files_are_found(saved: Simulated) -> None:
    first, second = file_of(saved, 0), file_of(saved, 1)
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    with pytest.raises(ChecksumMismatch):
        saved.load([whole("a")])


def test_files_are_closed_when_they_are_read(saved: Simulated) -> None:
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    wants = [Want(0, saved.checkpoint.plan.by_name["a"], Piece.box((0,), (SIZE,)))]
    target = torch.zeros(SIZE)
    with CheckpointFiles(saved.store, "", saved.checkpoint) as files:
        reads = plan_reads(saved.checkpoint.plan, wants)
        read_into(files, reads, {0: Destination(target, wants[0].piece)}, workers=3)
        assert len(list(Path("/proc/self/fd").iterdir())) == open_before
        assert files.bytes_read == sum(file.nbytes for file in reads)


def test_chunks_are_cut_at_multiples_of_their_size() -> None:
    reads = FileReads(3, (), ((0, 100), (128, 129), (256, 640)))
    chunks = [(chunk.start, chunk.stop) for chunk in cut_chunks([reads], 256)]
    assert chunks == [(0, 100), (128, 129), (256, 512), (512, 640)]
    assert all(isinstance(chunk, Chunk) and chunk.reads is reads for chunk in cut_chunks([reads], 256))


# ---- placing


def stored_rows() -> tuple[torch.Tensor, Piece]:
    piece = Piece.box((2, 0), (4, 6))
    return part(torch.arange(60, dtype=torch.int32).view(10, 6), piece), piece


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.int64, torch.bfloat16])
@pytest.mark.parametrize("contiguous", [True, False])
def test_parts_are_placed_and_converted(dtype: torch.dtype, contiguous: bool) -> None:
    elements, source = stored_rows()
    piece = Piece.box((1, 0), (4, 6))
    target = torch.full((4, 6), -1, dtype=dtype) if contiguous else torch.full((6, 4), -1, dtype=dtype).t()
    place(memoryview(bytearray(elements.numpy().tobytes())), "int32", source, Destination(target, piece))
    expected = torch.arange(6, 30, dtype=torch.int32).view(4, 6).to(dtype)
    expected[0] = -1
    assert torch.equal(target, expected)


def test_a_window_is_filled_by_position() -> None:
    elements, source = stored_rows()
    target = torch.full((10,), -1, dtype=torch.int32)
    place(memoryview(bytearray(elements.numpy().tobytes())), "int32", source, Destination(target, Piece.flat((10, 6), 8, 18)))
    assert target.tolist() == [-1] * 4 + list(range(12, 18))


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (0, 12), (10, 20), (20, 40), (33, 50), (36, 60), (40, 50)])
def test_a_window_takes_only_what_is_its_own(start: int, stop: int) -> None:
    """What is read can end before a window starts, or start after its end: elements 12 to 36 are stored here."""
    source = Piece.flat((10, 6), 12, 36)
    elements = torch.arange(12, 36, dtype=torch.int32)
    target = torch.full((stop - start,), -1, dtype=torch.int32)
    place(
        memoryview(bytearray(elements.numpy().tobytes())),
        "int32",
        source,
        Destination(target, Piece.flat((10, 6), start, stop)),
    )
    assert target.tolist() == [at if 12 <= at < 36 else -1 for at in range(start, stop)]


def test_leaves_that_require_grad_are_filled() -> None:
    elements, source = stored_rows()
    target = torch.nn.Parameter(torch.zeros(4, 6).t().contiguous().t())
    place(memoryview(bytearray(elements.numpy().tobytes())), "int32", source, Destination(target, source))
    assert torch.equal(target.detach(), elements.float())
    assert target.grad_fn is None


def test_boxes_are_put_where_they_belong() -> None:
    target = torch.zeros(4, 5)
    piece = Piece.box((3, 1), (4, 5))
    for a, b in itertools.product(range(3, 7), range(1, 6)):
        (copy,) = intersect(Piece.box((a, b), (1, 1)), piece)
        put(Destination(target, piece), copy, torch.tensor([[10.0 * a + b]]))
    assert torch.equal(target, torch.tensor([[10.0 * a + b for b in range(1, 6)] for a in range(3, 7)]))
