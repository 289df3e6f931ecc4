# SPDX-License-Identifier: Apache-2.0
"""One bit is another one than was written, anywhere: every load says so, and where."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

import shardckpt
from shardckpt.buffer import Buffer
from shardckpt.errors import ChecksumMismatch, InvalidManifest, UnsupportedVersion
from shardckpt.read import CheckpointFiles, Chunk
from shardckpt.reshard import FileReads
from shardckpt.store import FileReader, LocalStore
from tests.corruption.make import (
    BLOCK,
    ONE_READER,
    blocks_state,
    flip,
    holds,
    manifest_path,
    rank_file,
    save_tiny,
    tell_refused,
    tiny_target,
)
from tests.engine.simulate import Simulated

HEADER = 4096
SEED = int(os.environ.get("SHARDCKPT_SEED", "20240611"))


@pytest.fixture
def tiny(tmp_path: Path) -> Simulated:
    """A checkpoint of two ranks, some bytes each."""
    return save_tiny(tmp_path)


def load_with(path: Path, bits: Iterable[tuple[int, int]], directory: Path) -> Iterator[tuple[int, Exception | None]]:
    """What loads of ``directory`` raise with one bit, (byte, bit), of ``path`` changed at a time."""
    for at, bit in bits:
        flip(path, at, bit)
        try:
            shardckpt.load(directory, tiny_target(), options=ONE_READER)
        except shardckpt.CheckpointError as error:
            yield at, error
        else:
            yield at, None
        flip(path, at, bit)


def all_bits(start: int, stop: int) -> list[tuple[int, int]]:
    return [(at, bit) for at in range(start, stop) for bit in range(8)]


def test_the_whole_one_is_good(tiny: Simulated, tmp_path: Path) -> None:
    target = tiny_target()
    shardckpt.load(tmp_path, target)
    for name, rank in (("sharded", None), ("halves", None), ("own", 0)):
        found = target[name].value if rank == 0 else target[name]
        assert torch.equal(found.view(torch.uint8), tiny.wholes[name, rank].view(torch.uint8))
    assert target["n"] == 1


@pytest.mark.slow
def test_every_bit_of_a_manifest(tiny: Simulated, tmp_path: Path) -> None:
    path = manifest_path(tmp_path)
    bits = all_bits(0, len(tiny.manifest))
    assert len(bits) > 6000
    for at, error in load_with(path, bits, tmp_path):
        # not even a bit of the version passes for a newer format
        assert type(error) is InvalidManifest, at
        assert "partly_filled" not in error.details
    assert path.read_bytes() == tiny.manifest
    tell_refused(len(bits))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_every_bit_of_data(tiny: Simulated, tmp_path: Path, rank: int) -> None:
    path = rank_file(tmp_path, rank)
    size = path.stat().st_size
    bits = all_bits(HEADER, size)
    for at, error in load_with(path, bits, tmp_path):
        assert type(error) is ChecksumMismatch, at
        assert (error.name, error.start, error.stop) == (path.name, HEADER, size)
        assert error.tensors == ["sharded", "halves", "own"]
    tell_refused(len(bits))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_bits_of_a_header_fail_a_load(tiny: Simulated, tmp_path: Path, rank: int) -> None:
    path = rank_file(tmp_path, rank)
    text = len(path.read_bytes()[:HEADER].rstrip())
    bits = [(at, at % 8) for at in (*range(text), *range(text, HEADER, 64), HEADER - 1)]
    for at, error in load_with(path, bits, tmp_path):
        assert type(error) is ChecksumMismatch, at
        assert (error.name, error.start, error.stop) == (path.name, 0, HEADER)
        assert error.tensors == ["sharded", "halves", "own"]
        assert "They are the header of" in str(error)
    tell_refused(len(bits))


class _FlippingReader(FileReader):
    """Reads one good file from memory, with one bit changed."""

    def __init__(self, name: str, data: bytes) -> None:
        super().__init__(name, len(data))
        self.data = bytearray(data)

    def _fill(self, offset: int, buffers: list[memoryview]) -> None:
        for buffer in buffers:
            buffer[:] = self.data[offset : offset + len(buffer)]
            offset += len(buffer)

    def close(self) -> None:
        """The next load reads it too."""


class _OneFile(LocalStore):
    """A store of which every file is the same reader."""

    reader: _FlippingReader

    def open(self, name: str) -> FileReader:
        return self.reader


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_every_bit_of_a_header(tiny: Simulated, tmp_path: Path, rank: int) -> None:
    """By what every load reads with, since whole loads would take minutes."""
    path = rank_file(tmp_path, rank)
    store = _OneFile(tmp_path)
    store.reader = _FlippingReader(path.name, path.read_bytes())
    data = store.reader.data
    chunk = Chunk(FileReads(rank, (), ((0, len(data) - HEADER),)), 0, len(data) - HEADER)
    buffer = Buffer(HEADER)
    with CheckpointFiles(store, "", tiny.checkpoint) as files:
        files.expect([chunk] * (8 * HEADER + 1))
        files.read_verified(chunk, buffer.bytes)
        for at, bit in all_bits(0, HEADER):
            data[at] ^= 1 << bit
            with pytest.raises(ChecksumMismatch):
                files.read_verified(chunk, buffer.bytes)
            data[at] ^= 1 << bit
        assert files.bytes_read == chunk.stop
    assert bytes(data) == path.read_bytes()
    tell_refused(8 * HEADER)


def test_sampled_bits_of_larger_data(tmp_path: Path) -> None:
    """Each is found in its own block, and names what lies there."""
    shardckpt.save(tmp_path, blocks_state(1))
    path = rank_file(tmp_path)
    size = path.stat().st_size
    # three blocks less a bit for each of two tensors of float64, then five of float16
    lengths = [3 * BLOCK, 3 * BLOCK, 10]
    assert size == HEADER + sum(lengths)
    generator = random.Random(SEED)
    print(f"SHARDCKPT_SEED={SEED}")
    sampled = [*range(HEADER, size, 7919), *(generator.randrange(HEADER, size) for _ in range(100)), size - 1]
    for at in sampled:
        flip(path, at, at % 8)
        state = blocks_state(0)
        with pytest.raises(ChecksumMismatch) as caught:
            shardckpt.load(tmp_path, state, options=ONE_READER)
        flip(path, at, at % 8)
        start = HEADER + (at - HEADER) // BLOCK * BLOCK
        assert (caught.value.start, caught.value.stop) == (start, min(start + BLOCK, size))
        assert caught.value.tensors == [["first"], ["second"], ["last"]][(start - HEADER) // (3 * BLOCK)]
        assert state["step"] == 0
    tell_refused(len(sampled))
    state = blocks_state(0)
    shardckpt.load(tmp_path, state)
    assert holds(state, 1)


def test_a_flipped_version_is_no_newer_version(tiny: Simulated, tmp_path: Path) -> None:
    path = manifest_path(tmp_path)
    path.write_bytes(tiny.manifest.replace(b'"version":1', b'"version":3'))
    with pytest.raises(InvalidManifest) as caught:
        shardckpt.load(tmp_path)
    assert not isinstance(caught.value, UnsupportedVersion)
