# SPDX-License-Identifier: Apache-2.0
"""Files that are cut, grown, gone, overwritten in part, or in the place of others: no load takes them for what was saved."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import shardckpt
from shardckpt.errors import ChecksumMismatch, InvalidManifest, MissingFile, TruncatedFile
from shardckpt.store import LocalStore
from shardckpt.store.filesystem import FileSystem
from tests.corruption.make import (
    BLOCK,
    ONE_READER,
    blocks_state,
    flip,
    holds,
    manifest_path,
    rank_file,
    save_steps,
    save_tiny,
    step_path,
    tell_refused,
    tiny_target,
)
from tests.ranks import RankPool

HEADER = 4096


def refused(directory: Path, kind: type[shardckpt.CheckpointError]) -> shardckpt.CheckpointError:
    """The error of a load into a tiny target, which is left as it was."""
    target = tiny_target()
    with pytest.raises(shardckpt.CheckpointError) as caught:
        shardckpt.load(directory, target, options=ONE_READER)
    assert type(caught.value) is kind
    if kind is not ChecksumMismatch:
        assert not target["sharded"].any()
        assert not target["halves"].any()
        assert "partly_filled" not in caught.value.details
    assert target["n"] == 0
    return caught.value


def test_a_manifest_cut_at_every_length(tmp_path: Path) -> None:
    text = save_tiny(tmp_path).manifest
    for length in range(len(text)):
        manifest_path(tmp_path).write_bytes(text[:length])
        refused(tmp_path, InvalidManifest)
    tell_refused(len(text))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_file_cut_at_every_length(tmp_path: Path, rank: int) -> None:
    save_tiny(tmp_path)
    path = rank_file(tmp_path, rank)
    size = path.stat().st_size
    for length in reversed(range(size)):
        os.truncate(path, length)
        error = refused(tmp_path, TruncatedFile)
        assert (error.name, error.wanted, error.got) == (path.name, size, length)
    tell_refused(size)


@pytest.mark.parametrize("more", [1, 9, 4096])
def test_a_rank_file_that_has_grown(tmp_path: Path, more: int) -> None:
    save_tiny(tmp_path)
    path = rank_file(tmp_path, 1)
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(bytes(more))
    assert refused(tmp_path, TruncatedFile).got == size + more


@pytest.mark.parametrize("more", [b"\n", b"{}", bytes(34)])
def test_a_manifest_that_has_grown(tmp_path: Path, more: bytes) -> None:
    text = save_tiny(tmp_path).manifest
    manifest_path(tmp_path).write_bytes(text + more)
    refused(tmp_path, InvalidManifest)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_file_that_is_gone(tmp_path: Path, rank: int) -> None:
    save_tiny(tmp_path)
    path = rank_file(tmp_path, rank)
    path.unlink()
    error = refused(tmp_path, MissingFile)
    assert (error.name, error.rank) == (path.name, rank)


# ---- ranges


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def copy_range(path: Path, start: int, to: int, length: int) -> None:
    overwrite(path, to, path.read_bytes()[start : start + length])


RANGES: dict[str, tuple[Callable[[Path], None], int]] = {
    "a sector of zeros": (lambda path: overwrite(path, HEADER + BLOCK + 512, bytes(512)), 1),
    "a page of zeros": (lambda path: overwrite(path, HEADER + 5 * BLOCK, bytes(4096)), 5),
    "a block of zeros": (lambda path: overwrite(path, HEADER + 2 * BLOCK, bytes(BLOCK)), 2),
    "a page twice": (lambda path: copy_range(path, HEADER + BLOCK, HEADER + BLOCK + 4096, 4096), 1),
    "a block in the place of the next": (lambda path: copy_range(path, HEADER, HEADER + BLOCK, BLOCK), 1),
    "a block that was moved by a byte": (lambda path: copy_range(path, HEADER + 3 * BLOCK, HEADER + 3 * BLOCK + 1, BLOCK), 3),
    "the tail of zeros": (lambda path: overwrite(path, HEADER + 6 * BLOCK, bytes(10)), 6),
}


@pytest.mark.parametrize(("damage", "block"), RANGES.values(), ids=RANGES)
def test_a_range_that_was_overwritten(tmp_path: Path, damage: Callable[[Path], None], block: int) -> None:
    state = blocks_state(1)
    # no two words are equal, so that every range can be told from every other
    for name in ("first", "second"):
        state[name] = torch.arange(len(state[name]), dtype=torch.float64) + (10_000_000 if name == "first" else 20_000_000)
    shardckpt.save(tmp_path, state)
    path = rank_file(tmp_path)
    damage(path)
    target = blocks_state(0)
    with pytest.raises(ChecksumMismatch) as caught:
        shardckpt.load(tmp_path, target, options=ONE_READER)
    size = path.stat().st_size
    found = (caught.value.name, caught.value.start, caught.value.stop)
    assert found == (path.name, HEADER + block * BLOCK, min(HEADER + (block + 1) * BLOCK, size))
    assert caught.value.tensors == [["first"], ["second"], ["last"]][block // 3]


@pytest.mark.parametrize("start", [0, 8, 100, 4000])
def test_a_range_of_zeros_in_a_header(tmp_path: Path, start: int) -> None:
    save_tiny(tmp_path)
    overwrite(rank_file(tmp_path), start, bytes(90))
    error = refused(tmp_path, ChecksumMismatch)
    assert (error.start, error.stop) == (0, HEADER)


# ---- the right file in the wrong place


def test_rank_files_of_two_steps_swapped(tmp_path: Path) -> None:
    """Of equal size and layout, and even with equal headers: only the digests of the data tell."""
    save_steps(tmp_path, 1, 2)
    one, two = (rank_file(step_path(tmp_path, step)) for step in (1, 2))
    assert one.read_bytes()[:HEADER] == two.read_bytes()[:HEADER]
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)
    for step in (1, 2):
        with pytest.raises(ChecksumMismatch) as caught:
            shardckpt.load(step_path(tmp_path, step), blocks_state(0))
        assert caught.value.start == HEADER


def test_rank_files_of_two_steps_swapped_with_their_names(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    one, two = (rank_file(step_path(tmp_path, step)) for step in (1, 2))
    one.rename(two.with_name(one.name))
    two.rename(one.with_name(two.name))
    for step in (1, 2):
        with pytest.raises(MissingFile):
            shardckpt.load(step_path(tmp_path, step), blocks_state(0))


def test_manifests_of_two_steps_swapped(tmp_path: Path) -> None:
    """Attempts have names of their own, so a manifest finds only the files that it was made for."""
    save_steps(tmp_path, 1, 2)
    one, two = (manifest_path(step_path(tmp_path, step)) for step in (1, 2))
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)
    for step in (1, 2):
        with pytest.raises(MissingFile):
            shardckpt.load(step_path(tmp_path, step), blocks_state(0))


def save_filled(root: str, fill: float) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shardckpt.save(root, {"w": distribute_tensor(torch.full((64, 33), fill), mesh, [Shard(0)]), "n": int(fill)})


def load_filled(root: str, read_once: str) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state: dict[str, Any] = {"w": distribute_tensor(torch.zeros(64, 33), mesh, [Shard(1)]), "n": 0}
    shardckpt.load(root, state, options=shardckpt.Options(read_once=read_once))  # type: ignore[arg-type]
    return state["w"].to_local().unique().tolist(), state["n"]


@pytest.mark.parametrize("read_once", ["never", "always"])
def test_a_file_of_another_attempt_at_the_same_step(ranks: RankPool, tmp_path: Path, read_once: str) -> None:
    """Two saves of one step in two places, of which one file is put in the place of its namesake: never a mix of both."""
    for fill in (1.0, 2.0):
        ranks.run(2, save_filled, str(tmp_path / f"{fill:g}"), fill)
    assert ranks.run(2, load_filled, str(tmp_path / "1"), read_once) == [([1.0], 1)] * 2
    shutil.copy(rank_file(tmp_path / "2", 1), rank_file(tmp_path / "1", 1))
    for outcome in ranks.run_expecting_errors(2, load_filled, str(tmp_path / "1"), read_once):
        assert isinstance(outcome, ChecksumMismatch)
        assert outcome.name == rank_file(tmp_path / "1", 1).name
        assert outcome.tensors == ["w"]


def test_rank_files_swapped_within_a_checkpoint(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_filled, str(tmp_path), 1.0)
    zero, one = (rank_file(tmp_path, rank) for rank in (0, 1))
    assert zero.stat().st_size == one.stat().st_size
    kept = zero.read_bytes()
    zero.write_bytes(one.read_bytes())
    one.write_bytes(kept)
    # their data is equal to the bit: what tells them apart is which rows the headers say it is
    for outcome in ranks.run_expecting_errors(2, load_filled, str(tmp_path), "never"):
        assert isinstance(outcome, ChecksumMismatch)
        assert (outcome.start, outcome.stop) == (0, HEADER)


# ---- changes while a load is at it


class _Replacing(FileSystem):
    """Does something once, right before the first read of a rank file: after it was listed, opened and measured."""

    def __init__(self, change: Callable[[], object]) -> None:
        self._change = change
        self._rank_files: set[int] = set()
        self.changed = 0

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        fd = super().open(path, flags, mode)
        if Path(path).name.startswith("rank-"):
            self._rank_files.add(fd)
        return fd

    def preadv(self, fd: int, buffers: Any, offset: int) -> int:
        if fd in self._rank_files and not self.changed:
            self.changed += 1
            self._change()
        return super().preadv(fd, buffers, offset)


def restore_while(root: Path, change: Callable[[], object], state: dict[str, Any]) -> int:
    """Restore the newest step, and have something done in the middle; returns the step."""
    fs = _Replacing(change)

    class Injected(shardckpt.Checkpointer):
        @staticmethod
        def _open_store(url: str | os.PathLike[str]) -> LocalStore:
            return LocalStore(url, fs)

    with Injected(root, options=ONE_READER) as ckpt:
        restored = ckpt.restore(state, fallback=True)
    assert fs.changed == 1
    assert restored is not None
    return restored.step


def test_a_file_that_is_replaced_while_it_is_open(tmp_path: Path) -> None:
    """The reader keeps the file that it has opened."""
    save_steps(tmp_path, 1, 2)
    path = rank_file(step_path(tmp_path, 2))
    other = tmp_path / "other"
    other.write_bytes(bytes(path.stat().st_size))
    state = blocks_state(0)
    assert restore_while(tmp_path, lambda: other.rename(path), state) == 2
    assert holds(state, 2)
    assert not any(path.read_bytes())


CHANGES: dict[str, Callable[[Path], object]] = {
    "overwritten": lambda path: flip(path, HEADER + 4 * BLOCK),
    "cut": lambda path: os.truncate(path, HEADER + BLOCK),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_that_is_changed_while_it_is_open(tmp_path: Path, change: Callable[[Path], object]) -> None:
    save_steps(tmp_path, 1, 2)
    state = blocks_state(0)
    assert restore_while(tmp_path, lambda: change(rank_file(step_path(tmp_path, 2))), state) == 1
    assert holds(state, 1)


def test_a_step_that_is_removed_while_it_is_read(tmp_path: Path) -> None:
    """As a prune of another process does: what is open can still be read."""
    save_steps(tmp_path, 1, 2)
    state = blocks_state(0)
    assert restore_while(tmp_path, lambda: shutil.rmtree(step_path(tmp_path, 2)), state) == 2
    assert holds(state, 2)


def test_a_manifest_that_is_replaced_after_the_load_began(tmp_path: Path) -> None:
    """All that a load does follows from the bytes that were read and checked once."""
    save_steps(tmp_path, 1, 2)
    one, two = (manifest_path(step_path(tmp_path, step)) for step in (1, 2))
    state = blocks_state(0)
    assert restore_while(tmp_path, lambda: two.write_bytes(one.read_bytes()), state) == 2
    assert holds(state, 2)
