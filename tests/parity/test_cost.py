# SPDX-License-Identifier: Apache-2.0
"""What parity costs: bytes on disk, bytes read and written by each rank, and memory."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt.buffer import CHUNK
from shardckpt.checksum import block_digests
from shardckpt.errors import ChecksumMismatch
from shardckpt.parity.xor import Body, Others, write_slice
from shardckpt.store import LocalStore, MemoryStore
from tests.parity.jobs import opened, parity_of
from tests.ranks import RankPool
from tests.store.faults import FaultyFileSystem
from tests.store.helpers import load_file, some_bytes, store_file

BLOCK = 1 << 16
MIB = 1 << 20
"""Bytes."""
ELEMENTS = 6 * MIB
"""Of each rank's tensor of four bytes each."""


def bodies_of(store: LocalStore | MemoryStore, sizes: Sequence[int], block: int = BLOCK) -> list[Body]:
    """Files of random bytes."""
    found = []
    for number, size in enumerate(sizes):
        data = some_bytes(size, seed=number)
        store_file(store, f"file-{number}", data)
        found.append(Body(f"file-{number}", size, 0, 0, block_digests(memoryview(data), block)))
    return found


def test_the_slice_is_the_xor_of_the_files_filled_up_with_zeros() -> None:
    store = MemoryStore("parity-xor")
    sizes = [3 * BLOCK + 5, 2 * BLOCK, 9 * BLOCK + 1, 0, 1]
    bodies = bodies_of(store, sizes)
    wanted = 0
    for number, size in enumerate(sizes):
        wanted ^= int.from_bytes(some_bytes(size, seed=number), "little")
    whole = wanted.to_bytes(max(sizes), "little")
    for start, stop in ((0, 4 * BLOCK), (4 * BLOCK, max(sizes))):
        with Others(store, bodies, BLOCK) as others, store.create(f"slice-{start}", stop - start) as writer:
            digests = write_slice(writer, start, others, BLOCK, workers=3)
            assert others.bytes_read == sum(max(0, min(size, stop) - start) for size in sizes)
        assert load_file(store, f"slice-{start}") == whole[start:stop]
        assert digests == block_digests(memoryview(whole[start:stop]), BLOCK)


def test_no_parity_is_made_of_damaged_data(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    bodies = bodies_of(store, [3 * BLOCK, 2 * BLOCK])
    data = bytearray((tmp_path / "file-1").read_bytes())
    data[BLOCK + 7] ^= 1
    (tmp_path / "file-1").write_bytes(data)
    try:
        with Others(store, bodies, BLOCK) as others, store.create("slice", 3 * BLOCK) as writer:
            write_slice(writer, 0, others, BLOCK, workers=2)
    except ChecksumMismatch as error:
        assert (error.name, error.start, error.stop) == ("file-1", BLOCK, 2 * BLOCK)
    else:
        raise AssertionError("the damage was not seen")
    assert not (tmp_path / "slice").exists()


def peak_growth(root: str, workers: int) -> tuple[int, int]:
    """By how many bytes the peak of this process grows when it makes a slice; and the length of the slice."""
    store = LocalStore(root)
    size, block = 96 * MIB, 16 * MIB
    digests = block_digests(memoryview(bytes(block)), block) * (size // block)
    bodies = []
    for number in range(3):
        with Path(root, f"file-{number}").open("wb") as stream:
            stream.truncate(size)
        bodies.append(Body(f"file-{number}", size, 0, 0, digests))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Others(store, bodies, block) as others, store.create("slice", size) as writer:
        write_slice(writer, 0, others, block, workers)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, size


def test_a_slice_takes_little_memory_even_with_the_largest_blocks(ranks: RankPool, tmp_path: Path) -> None:
    ((grown, size),) = ranks.run(1, peak_growth, str(tmp_path), 4, fresh=True)
    assert (tmp_path / "slice").stat().st_size == size
    # what was there before may hide a block of 16 MiB, of the 64 MiB that are promised
    assert grown <= 48 * MIB


class Counting(FaultyFileSystem):
    """Counts bytes that are read of rank files."""

    def __init__(self) -> None:
        super().__init__()
        self.read = 0

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        got = super().preadv(fd, buffers, offset)
        with self._lock:
            self.read += got
        return got


def save_and_count(root: str, kind: str) -> tuple[int, int]:
    """Bytes that this rank reads back for the parity of a save, and the length of the manifest, which it reads too."""
    fs = Counting()

    class Injected(shardckpt.Checkpointer):
        @staticmethod
        def _open_store(url: object) -> LocalStore:
            return LocalStore(root, fs)

    limit = {"ring": 4 * CHUNK * dist.get_world_size()}
    options = shardckpt.Options(parity="xor:4", stage="none" if kind == "none" else "eager", host_memory_limit=limit.get(kind))
    state = {"own": shardckpt.PerRank(torch.full((ELEMENTS,), float(dist.get_rank())))}
    with Injected(root, options=options) as ckpt:
        ckpt.save(1, state, wait=kind == "wait")
        ckpt.wait()
    return fs.read, Path(root, "step-00000001", "manifest.json").stat().st_size


@pytest.mark.parametrize(("kind", "reads_data"), [("wait", False), ("eager", False), ("ring", True), ("none", True)])
def test_each_rank_takes_as_much_as_one_file_and_writes_a_quarter_of_it(
    ranks: RankPool, tmp_path: Path, kind: str, reads_data: bool
) -> None:
    """Storage is read only where the data is not in memory any more."""
    found = ranks.run(4, save_and_count, str(tmp_path), kind, timeout=200.0)
    path = tmp_path / "step-00000001"
    data = opened(path).checkpoint.manifest.files[0]
    length = data.size - data.data
    assert length == 4 * ELEMENTS
    assert [file.size for file in parity_of(path).files] == [length // 4] * 4
    for rank, (read, manifest) in enumerate(found):
        least = length if reads_data else 0
        manifests = 2 if rank == 0 else 1
        assert least <= read <= least + manifests * manifest + (65536 if rank == 0 else 0)
