# SPDX-License-Identifier: Apache-2.0
"""Files for other programs appear whole or not at all, at whatever system call the disk fails."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from shardckpt.errors import StoreError
from shardckpt.store.base import is_temporary
from shardckpt.store.filesystem import FileSystem
from shardckpt.store.outside import new_directory, new_file

# not listdir: what a clean-up cannot list stays, under a name that says it is temporary
FAILING = ("open", "pwrite", "fsync", "mkdir", "rename", "link")


class Faulty(FileSystem):
    """Fails the call number ``at`` among those that can fail; with -1 only counts them."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.calls = 0

    def __getattribute__(self, name: str) -> Any:
        if name in FAILING:
            self.calls += 1
            if self.calls - 1 == self.at:
                raise OSError(errno.EIO, "the disk failed")
        return super().__getattribute__(name)


def make_directory(place: Path, fs: FileSystem, text: bytes, *, replace: bool) -> None:
    with new_directory(str(place / "out"), replace=replace, fs=fs) as directory:
        for name in ("a", "below/b"):
            with directory.file(name) as file:
                file.write(text)


def make_file(place: Path, fs: FileSystem, text: bytes, *, replace: bool) -> None:
    with new_file(str(place / "out"), replace=replace, fs=fs) as file:
        file.write(text)


def content(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("make", [make_directory, make_file])
def test_a_fault_at_any_call_leaves_the_old_or_the_new(tmp_path: Path, make: Any, replace: bool) -> None:
    counting = Faulty(-1)
    whole = {}
    for text in (b"old", b"new"):
        make(tmp_path / "reference", counting if text == b"new" else FileSystem(), text, replace=text == b"new")
        whole[text] = content(tmp_path / "reference")
    before = whole[b"old"] if replace else {}
    outcomes = set()
    for at in range(counting.calls):
        place = tmp_path / str(at)
        place.mkdir()
        if replace:
            make(place, FileSystem(), b"old", replace=False)
        try:
            make(place, Faulty(at), b"new", replace=replace)
            outcomes.add("made")
        except StoreError as error:
            assert "EIO" in error.message
            outcomes.add("failed")
        found = content(place)
        aside = [name for name in found if is_temporary(name.split("/")[0])]
        old = {f"out/{name.split('/', 1)[1]}": found.pop(name) for name in aside}
        # what was replaced is kept aside when it is not known whether the new one is durable
        assert not old or (old == before and found == whole[b"new"]), at
        assert found in (before, whole[b"new"]), at
    assert "failed" in outcomes
