# SPDX-License-Identifier: Apache-2.0
"""Rank files: any safetensors reader opens them, receipts say what they hold, and memory stays bounded."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from shardckpt.checksum import digest
from shardckpt.errors import StorageFull, StoreError
from shardckpt.header import safetensors_header
from shardckpt.layout import ITEMSIZE, Mesh, MeshLayout, PerRankShapes, Replicate, Shard, StridedShard
from shardckpt.manifest import HEADER_ALIGNMENT
from shardckpt.plan import Plan
from shardckpt.store import FileWriter, LocalStore, MemoryStore
from tests.engine.simulate import by_hand, local_tensors, part, random_tensors, same_bits, save, write_file
from tests.store.faults import FaultyFileSystem

LINE2 = Mesh((0, 1), (2,))
EVERY_DTYPE = [name for name in ITEMSIZE if hasattr(torch, name)]


def every_dtype() -> Plan:
    layout = MeshLayout((5, 3), LINE2, (Shard(0),))
    return by_hand(2, {f"t.{dtype}": (dtype, layout, (0, 1)) for dtype in EVERY_DTYPE})


def kinds_of_pieces() -> Plan:
    """Names that are whole, boxes, strided, windows, per rank, 0-d, and one that safetensors keeps for itself."""
    grid = Mesh((0, 1, 2, 3), (2, 2))
    everywhere = MeshLayout((6, 5), Mesh((0, 1, 2, 3), (4,)), (Replicate(),))
    return by_hand(
        4,
        {
            "__metadata__": ("float32", everywhere, (0, 1)),
            "whole": ("float32", everywhere, (1, 1)),
            "slices": ("float32", everywhere, (2, 4)),
            "rows/of a ~1 matrix": ("float32", MeshLayout((6, 5), grid, (Replicate(), Shard(0))), (1, 1)),
            "strided": ("float32", MeshLayout((9, 2), grid, (StridedShard(0, 2), Replicate())), (0, 1)),
            "scalar": ("float32", MeshLayout((), grid, (Replicate(), Replicate())), (3, 1)),
            "per rank": ("float32", PerRankShapes(((2,), None, (1, 3), ())), (0, 1)),
            "empty": ("float32", MeshLayout((0, 3), grid, (Shard(0), Shard(1))), (0, 1)),
        },
    )


def rank_files(root: Path) -> list[Path]:
    return sorted(root.glob("rank-*.safetensors"))


@pytest.mark.parametrize("plan", [kinds_of_pieces(), every_dtype()], ids=["kinds of pieces", "dtypes"])
def test_the_reader_of_safetensors_opens_every_file(tmp_path: Path, plan: Plan) -> None:
    saved = save(LocalStore(tmp_path), plan)
    files = rank_files(tmp_path)
    assert len(files) == plan.world_size
    for rank, path in enumerate(files):
        with safe_open(path, "pt") as file:
            read = {name: file.get_tensor(name) for name in list(file.keys())}
        pieces = plan.file_pieces(rank)
        assert len(read) == len(pieces)
        for found in pieces:
            (name,) = [n for n in read if n.split("@")[0] == found.tensor.name]
            own = rank if isinstance(found.tensor.layout, PerRankShapes) else None
            expected = part(saved.wholes[found.tensor.name, own], found.piece)
            assert same_bits(read[name].reshape(-1).view(expected.dtype).view(expected.shape), expected), name


def test_entries_say_which_part_they_are(tmp_path: Path) -> None:
    save(LocalStore(tmp_path), kinds_of_pieces())
    names = set()
    for path in rank_files(tmp_path):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    assert {"whole", "scalar", "__metadata__@0:6,0:5", "rows/of a ~1 matrix@3:6,0:5", "per rank", "per rank@0:1,0:3"} <= names
    assert {f"slices@0:6,0:5[{at}:{min(at + 8, 30)}]" for at in (0, 8, 16, 24)} <= names
    assert {"strided@0:3+5:7,0:2", "strided@3:5+7:9,0:2"} <= names


def test_data_starts_on_a_page(tmp_path: Path) -> None:
    plan = by_hand(
        1, {f"name-{i:04}" * 8: ("uint8", MeshLayout((1,), Mesh((0,), (1,)), (Shard(0),)), (0, 1)) for i in range(99)}
    )
    save(LocalStore(tmp_path), plan)
    data = rank_files(tmp_path)[0].read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert (8 + length) % HEADER_ALIGNMENT == 0
    assert data[: 8 + length] == safetensors_header(plan.file_pieces(0))
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert len(header) == 99
    assert len(data) == 8 + length + 99


def test_receipts_have_the_digests_of_all_blocks() -> None:
    layout = MeshLayout((9_000_001,), LINE2, (Shard(0),))
    plan = by_hand(2, {"x": ("uint8", layout, (0, 1))}, 1 << 16)
    store = MemoryStore("receipts")
    wholes = random_tensors(plan)
    for rank in range(2):
        receipt = write_file(store, f"file-{rank}", plan, rank, local_tensors(plan, rank, wholes), workers=3)
        data = store.get(f"file-{rank}", 1 << 30)
        body = data[receipt.data :]
        assert (len(data), len(body)) == (receipt.size, plan.bytes_by_rank[rank])
        assert receipt.header == digest(data[: receipt.data]).hex()
        expected = [digest(body[at : at + (1 << 16)]) for at in range(0, len(body), 1 << 16)]
        assert receipt.digests == b"".join(expected)
        assert len(receipt.digests) // 8 == len(expected)


def test_a_rank_without_data_writes_a_file_too(tmp_path: Path) -> None:
    save(LocalStore(tmp_path), by_hand(2, {"x": ("float32", MeshLayout((1,), LINE2, (Shard(0),)), (0, 1))}))
    assert rank_files(tmp_path)[1].stat().st_size == HEADER_ALIGNMENT
    with safe_open(rank_files(tmp_path)[1], "pt") as file:
        assert list(file.keys()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("operation", ["pwrite", "fsync"])
def test_a_write_that_fails_leaves_no_file(tmp_path: Path, operation: str, code: int) -> None:
    plan = by_hand(1, {"x": ("uint8", MeshLayout((20 << 20,), Mesh((0,), (1,)), (Shard(0),)), (0, 1))})
    fs = FaultyFileSystem()
    store = LocalStore(tmp_path, fs)
    write_file(store, "good", plan, 0, local_tensors(plan, 0, random_tensors(plan)), workers=2)
    fs.fail(operation, code, nth=2)
    with pytest.raises(StorageFull if code == errno.ENOSPC else StoreError):
        write_file(store, "bad", plan, 0, local_tensors(plan, 0, random_tensors(plan)), workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


class CountingStore(MemoryStore):
    """Counts the threads that are inside of a write at once."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.most = 0

    def create(self, name: str, size: int) -> FileWriter:
        writer = super().create(name, size)
        write, inside, lock = writer._write, [0], threading.Lock()

        def counted(offset: int, buffer: memoryview) -> None:
            with lock:
                inside[0] += 1
                self.most = max(self.most, inside[0])
            write(offset, buffer)
            with lock:
                inside[0] -= 1

        writer._write = counted  # type: ignore[method-assign]
        return writer


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_no_more_threads_write_than_were_asked_for(workers: int) -> None:
    plan = by_hand(1, {"x": ("uint8", MeshLayout((64 << 20,), Mesh((0,), (1,)), (Shard(0),)), (0, 1))})
    store = CountingStore(f"threads-{workers}")
    tensors: dict[str, torch.Tensor] = {"x": torch.zeros(64 << 20, dtype=torch.uint8)}
    write_file(store, "file", plan, 0, tensors, workers=workers)
    assert 1 <= store.most <= workers


VIEWS: Sequence[tuple[str, torch.Tensor]] = [
    ("transposed", torch.arange(3000 * 700).view(3000, 700).t()),
    ("every other", torch.arange(4_000_000)[::2]),
    ("expanded", torch.arange(1500).expand(1000, 1500)),
    ("channels last", torch.randn(4, 32, 100, 90).to(memory_format=torch.channels_last)),
    ("negative", torch.imag(torch.randn(1_000_000, dtype=torch.complex64).conj()).resolve_neg()),
    ("0-d of a larger one", torch.arange(10)[3]),
    ("one element, with the stride of many", torch.arange(10)[::2][1:2]),
]


@pytest.mark.parametrize(("kind", "view"), VIEWS, ids=[kind for kind, _ in VIEWS])
def test_views_are_gathered_chunk_by_chunk(kind: str, view: torch.Tensor) -> None:
    shape = tuple(view.shape)
    dtype = str(view.dtype).removeprefix("torch.")
    plan = by_hand(1, {"x": (dtype, MeshLayout(shape, Mesh((0,), (1,)), (Replicate(),)), (0, 1))})
    store = MemoryStore(f"views-{kind}")
    receipt = write_file(store, "file", plan, 0, {"x": view}, workers=2)
    data = bytearray(store.get("file", 1 << 30)[receipt.data :])
    assert same_bits(torch.frombuffer(data, dtype=view.dtype).view(shape), view.contiguous())
