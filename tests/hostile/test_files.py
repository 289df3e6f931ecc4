# SPDX-License-Identifier: Apache-2.0
"""Only regular files are read: no links, FIFOs, devices, sockets or directories in their place, also when they are put there
between a check and a use.

The place that a user names may be reached by links. Below it, a step directory that is a link is no step: it is neither listed
nor restored nor pruned, and is loaded only by who names it itself.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt
from shardckpt.coordinate import Coordinator
from shardckpt.errors import CheckpointError, CheckpointNotFound, ChecksumMismatch, MissingFile, StoreError, TruncatedFile
from shardckpt.loading import Load
from shardckpt.manifest import MANIFEST_NAME, step_directory
from shardckpt.options import Options
from shardckpt.store import LocalStore
from shardckpt.store.filesystem import FileSystem
from shardckpt.targets import Selection
from tests.cli.run import run
from tests.maintain.make import rank_file

VALUES = torch.arange(1000.0)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "saved"
    shardckpt.save(path, {"x": VALUES})
    return path


def link(path: Path) -> None:
    """Put the same file behind a link."""
    there = path.parent.parent / path.name
    path.rename(there)
    path.symlink_to(there)


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nothing")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def listen(path: Path) -> None:
    path.unlink()
    # bound by a name in the working directory, as names of sockets are short
    before = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(before)


def device(path: Path) -> None:
    path.unlink()
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("making a device takes rights that this user does not have")


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a link": (link, "symbolic link"),
    "a link to nothing": (dangle, "symbolic link"),
    "a FIFO": (fifo, "FIFO"),
    "a directory": (directory, "directory"),
    "a socket": (listen, "socket"),
    "a device": (device, "character device"),
}


@pytest.mark.parametrize(("make", "what"), KINDS.values(), ids=KINDS)
def test_what_is_no_regular_file_is_no_manifest(saved: Path, make: Callable[[Path], None], what: str) -> None:
    make(saved / MANIFEST_NAME)
    with pytest.raises(StoreError, match=what):
        shardckpt.load(saved)


@pytest.mark.parametrize(("make", "what"), KINDS.values(), ids=KINDS)
def test_what_is_no_regular_file_is_no_rank_file(saved: Path, make: Callable[[Path], None], what: str) -> None:
    make(rank_file(saved))
    # a listing has only regular files; a part of a checkpoint is read without one
    with pytest.raises(MissingFile, match="is missing"):
        shardckpt.load(saved)
    target = {"x": torch.zeros(1000)}
    with pytest.raises(StoreError, match=what):
        shardckpt.load(saved, target, keys=["x"])
    assert not target["x"].any()
    done = run("verify", saved)
    assert done.status == 1
    assert what in done.out


# ---- directories


def test_a_place_may_be_reached_by_a_link(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(saved)
    assert torch.equal(shardckpt.load(tmp_path / "alias").state["x"], VALUES)


def test_a_step_directory_that_is_a_link_is_no_step(saved: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    with shardckpt.Checkpointer(root) as ckpt:
        ckpt.save(1, {"x": VALUES + 1}, wait=True)
    linked = root / step_directory(2)
    linked.symlink_to(saved)
    assert shardckpt.load(root).step == 1
    with shardckpt.Checkpointer(root) as ckpt:
        assert ckpt.steps() == [1]
        with pytest.raises(CheckpointNotFound, match="step 2 is not committed"):
            ckpt.restore({"x": torch.zeros(1000)}, step=2)
    assert step_directory(2) not in run("ls", root).out
    assert run("prune", root, "--keep-last", "1").status == 0
    assert sorted(path.name for path in saved.iterdir()) == sorted([MANIFEST_NAME, rank_file(saved).name])
    assert torch.equal(shardckpt.load(linked).state["x"], VALUES)


# ---- swapped between check and use


class Swapping(FileSystem):
    """The real file system, on which something happens before the first ``operation`` on a file whose name ends like this."""

    def __init__(self, operation: str, ending: str, act: Callable[[], object]) -> None:
        self._operation = operation
        self._ending = ending
        self._act: Callable[[], object] | None = act
        self._names: dict[int, str] = {}

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        self._meet("open", path)
        fd = super().open(path, flags, mode)
        self._names[fd] = path
        return fd

    def fstat(self, fd: int) -> os.stat_result:
        self._meet("fstat", self._names[fd])
        return super().fstat(fd)

    def preadv(self, fd: int, buffers: Any, offset: int) -> int:
        self._meet("preadv", self._names[fd])
        return super().preadv(fd, buffers, offset)

    @property
    def has_swapped(self) -> bool:
        return self._act is None

    def _meet(self, operation: str, path: str) -> None:
        if operation == self._operation and path.endswith(self._ending) and self._act is not None:
            act, self._act = self._act, None
            act()


def load(path: Path, fs: FileSystem) -> torch.Tensor:
    with Coordinator.connect(timeout=60) as coordinator:
        restored = Load(coordinator, LocalStore(path, fs), "", Selection(), Options()).run(None)
    found: torch.Tensor = restored.state["x"]
    return found


def overwrite(path: Path) -> None:
    """Another file of the same size in its place."""
    new = path.with_name("new")
    new.write_bytes(bytes(path.stat().st_size))
    new.rename(path)


def shorten(path: Path) -> None:
    new = path.with_name("new")
    new.write_bytes(path.read_bytes()[:-1])
    new.rename(path)


def cut_in_place(path: Path) -> None:
    os.truncate(path, 4096)


def zero_in_place(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(bytes(8192))


SWAPS: dict[str, tuple[str, Callable[[Path], None], type[CheckpointError], str]] = {
    "a link": ("open", link, StoreError, "symbolic link"),
    "a FIFO": ("open", fifo, StoreError, "FIFO"),
    "a directory": ("open", directory, StoreError, "directory"),
    "nothing": ("open", lambda path: path.unlink(), MissingFile, "is missing"),
    "a shorter file": ("open", shorten, TruncatedFile, "has 8095 bytes, the manifest says 8096"),
    "other bytes": ("open", overwrite, ChecksumMismatch, "do not match their digest"),
    "cut before it is looked at": ("fstat", cut_in_place, TruncatedFile, "has 4096 bytes, the manifest says 8096"),
    "cut before it is read": ("preadv", cut_in_place, TruncatedFile, "too short"),
    "changed before it is read": ("preadv", zero_in_place, ChecksumMismatch, "do not match their digest"),
}


@pytest.mark.parametrize(("operation", "swap", "kind", "message"), SWAPS.values(), ids=SWAPS)
def test_rank_files_that_are_swapped_in_the_midst_of_a_load(
    saved: Path, operation: str, swap: Callable[[Path], None], kind: type[CheckpointError], message: str
) -> None:
    fs = Swapping(operation, ".safetensors", lambda: swap(rank_file(saved)))
    with pytest.raises(kind, match=message):
        load(saved, fs)
    assert fs.has_swapped


@pytest.mark.parametrize("swap", [link, fifo, directory], ids=lambda swap: str(swap.__name__))
def test_manifests_that_are_swapped_in_the_midst_of_a_load(saved: Path, swap: Callable[[Path], None]) -> None:
    fs = Swapping("open", MANIFEST_NAME, lambda: swap(saved / MANIFEST_NAME))
    with pytest.raises(StoreError):
        load(saved, fs)
    assert fs.has_swapped


@pytest.mark.parametrize("swap", [link, fifo, overwrite], ids=lambda swap: str(swap.__name__))
def test_what_is_open_stays_what_it_was(saved: Path, swap: Callable[[Path], None]) -> None:
    fs = Swapping("preadv", ".safetensors", lambda: swap(rank_file(saved)))
    assert torch.equal(load(saved, fs), VALUES)
    assert fs.has_swapped


def test_directories_that_are_moved_in_the_midst_of_a_load(saved: Path, tmp_path: Path) -> None:
    fs = Swapping("open", ".safetensors", lambda: shutil.move(saved, tmp_path / "away"))
    with pytest.raises(CheckpointError, match="was removed while it was read"):
        load(saved, fs)
    assert fs.has_swapped
    assert torch.equal(shardckpt.load(tmp_path / "away").state["x"], VALUES)


# ---- headers of rank files, which nothing believes


@pytest.mark.parametrize(
    "header",
    [
        pytest.param((1 << 63).to_bytes(8, "little"), id="a length of exabytes"),
        pytest.param((8).to_bytes(8, "little") + b'{"a":{}}', id="another text"),
        pytest.param((4088).to_bytes(8, "little") + b"[" * 4088, id="deep nesting"),
        pytest.param(bytes(4096), id="nothing"),
    ],
)
def test_hostile_headers_are_compared_and_never_parsed(saved: Path, header: bytes) -> None:
    with open(rank_file(saved), "r+b") as file:
        file.write(header)
    with pytest.raises(ChecksumMismatch, match="are the header of 'x'"):
        shardckpt.load(saved)
    done = run("verify", saved)
    assert done.status == 1
    assert "ChecksumMismatch" in done.out
