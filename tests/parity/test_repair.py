# SPDX-License-Identifier: Apache-2.0
"""``shardckpt repair``: files come back bit by bit as they were written, and nothing that is good is touched."""

from __future__ import annotations

import errno
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from shardckpt.errors import CheckpointError, StorageFull
from shardckpt.maintain.repair import carry_out, plan_repairs
from shardckpt.store import LocalStore, MemoryStore, Store
from tests.cli.run import run
from tests.parity.jobs import cut, extend, flip, lose, opened, parity_file, rank_file, zero
from tests.store.faults import FaultyFileSystem, Killed
from tests.store.helpers import load_file, store_file

Copy = Callable[[int], Path]


def contents(path: Path) -> dict[str, bytes]:
    """All files of a checkpoint."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


def stamps(path: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is written or replaced."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in path.iterdir()}


@pytest.mark.parametrize("damage", [lose, cut, extend, zero, flip], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("size", [2, 4])
def test_every_damaged_file_comes_back_as_it_was(copy: Copy, size: int, damage: Callable[[Path], None]) -> None:
    path = copy(size)
    before = contents(path)
    for name in sorted(before):
        if name.endswith((".safetensors", ".xor")):
            others = {other: stamp for other, stamp in stamps(path).items() if other != name}
            damage(path / name)
            done = run("repair", path, "--json").json
            (found,) = done["checkpoints"][0]["files"]
            assert (done["ok"], found["file"], found["repaired"], found["obstacle"]) == (True, name, True, None)
            assert contents(path) == before
            assert {other: stamp for other, stamp in stamps(path).items() if other != name} == others
    assert run("verify", path, "--read-data").status == 0


def test_nothing_is_done_when_all_is_well(copy: Copy) -> None:
    path = copy(2)
    before = stamps(path)
    done = run("repair", path)
    assert (done.status, done.out) == (0, f"{path}: ok, nothing to repair\n")
    assert stamps(path) == before


def test_a_dry_run_says_what_would_be_done_and_does_nothing(copy: Copy) -> None:
    path = copy(2)
    lost = parity_file(path, 0, 1)
    lose(lost)
    flip(rank_file(path, 3))
    before = stamps(path)
    done = run("repair", path, "--dry-run")
    ranks = [rank_file(path, rank).name for rank in range(4)]
    assert done.status == 0
    assert [line.strip() for line in done.out.splitlines()] == [
        f"{path}: 2 damaged files",
        lost.name,
        f"cannot open {str(lost)!r}: No such file or directory (ENOENT); it was deleted, never written, or the path is wrong",
        f"would be rebuilt from {ranks[0]}, {ranks[2]}",
        ranks[3],
        "1 of 3 blocks do not match their digest, or cannot be read",
        f"would be rebuilt from {parity_file(path, 1, 1).name}",
    ]
    assert stamps(path) == before
    planned = run("repair", path, "--dry-run", "--json").json
    assert [file["repaired"] for file in planned["checkpoints"][0]["files"]] == [False, False]
    assert run("repair", path).status == 0
    assert run("repair", path).out == f"{path}: ok, nothing to repair\n"


def test_several_files_of_a_group_are_repaired_where_they_differ_in_places(copy: Copy) -> None:
    path = copy(4)
    before = contents(path)
    manifest = opened(path).checkpoint.manifest
    block, data = manifest.block_size, manifest.files[0].data
    flip(rank_file(path, 0), data + 3 * block)
    flip(rank_file(path, 2), data + 4 * block)
    flip(rank_file(path, 3), data)
    flip(parity_file(path, 0, 1), 2 * block)
    assert len(run("repair", path, "--json").json["checkpoints"][0]["files"]) == 4
    assert contents(path) == before


def test_two_lost_files_of_a_group_cannot_be_repaired_and_the_other_group_can(copy: Copy) -> None:
    path = copy(2)
    for rank in (0, 2, 3):
        lose(rank_file(path, rank))
    done = run("repair", path, "--json")
    assert done.status == 1
    files = done.json["checkpoints"][0]["files"]
    assert [file["repaired"] for file in files] == [False, False, True]
    assert files[0]["obstacle"] == f"{files[1]['file']} of the same group is damaged in the same places"
    assert rank_file(path, 3).exists()
    assert not list(path.glob("rank-00000-*"))
    assert "cannot be repaired" in run("repair", path, "--dry-run").out


def test_without_parity_only_what_follows_from_the_manifest_can_be_repaired(copy: Copy) -> None:
    path = copy(2)
    for file in path.glob("parity-*"):
        lose(file)
    before = contents(path)
    flip(rank_file(path, 0), 20)
    extend(rank_file(path, 1))
    assert run("repair", path).status == 0
    assert contents(path) == before
    flip(rank_file(path, 0))
    done = run("repair", path)
    assert done.status == 1
    assert "cannot be repaired: it has no parity" in done.out


def test_a_damaged_record_and_a_damaged_manifest_cannot_be_repaired(copy: Copy) -> None:
    path = copy(2)
    flip(next(path.glob("parity-*.json")), 10)
    done = run("repair", path, "--json")
    assert done.status == 1
    assert "remove it" in done.json["checkpoints"][0]["files"][0]["obstacle"]
    flip(path / "manifest.json", 10)
    done = run("repair", path, "--json")
    assert done.status == 1
    assert "nothing can be rebuilt without the manifest" in done.json["checkpoints"][0]["files"][0]["obstacle"]


def test_a_whole_root_is_repaired(copy: Copy, tmp_path: Path) -> None:
    path = copy(2)
    root = tmp_path / "root"
    root.mkdir()
    path.rename(root / "step-00000001")
    before = contents(root / "step-00000001")
    lose(rank_file(root / "step-00000001", 1))
    assert run("repair", root).status == 0
    assert contents(root / "step-00000001") == before


@pytest.fixture(params=["memory", "object"])
def other_store(request: pytest.FixtureRequest) -> Store:
    """A store that is no directory."""
    if request.param == "memory":
        return MemoryStore(uuid.uuid4().hex)
    endpoint = request.getfixturevalue("s3_endpoint")
    from tests.store.s3 import object_store

    return object_store(endpoint, uuid.uuid4().hex)


def test_other_stores_are_repaired_too(originals: dict[int, Path], other_store: Store) -> None:
    before = contents(originals[4])
    for name, data in before.items():
        store_file(other_store, name, data)
    name = rank_file(originals[4], 2).name
    other_store.delete(name)
    other = rank_file(originals[4], 1).name
    other_store.delete(other)
    store_file(other_store, other, before[other] + b"!")
    (plan,) = plan_repairs(other_store)
    assert [(repair.file, repair.obstacle) for repair in plan.repairs] == [(other, None), (name, None)]
    for repair in plan.repairs:
        carry_out(other_store, repair)
    assert {entry.name: load_file(other_store, entry.name) for entry in other_store.list()} == before
    (plan,) = plan_repairs(other_store)
    assert plan.repairs == ()


@pytest.mark.parametrize("how", ["killed", "full"])
def test_a_repair_that_is_broken_off_leaves_the_damaged_file_or_the_good_one(copy: Copy, how: str) -> None:
    path = copy(4)
    file = rank_file(path, 1)
    good = file.read_bytes()
    flip(file)
    damaged = file.read_bytes()
    fs = FaultyFileSystem()
    store = LocalStore(path, fs)
    (plan,) = plan_repairs(store)
    calls = len(fs.calls)
    carry_out(store, plan.repairs[0])
    calls = len(fs.calls) - calls
    seen = []
    for number in range(0, calls, 2):
        file.write_bytes(damaged)
        fs = FaultyFileSystem()
        if how == "killed":
            fs.die_after(number)
        else:
            fs.fail("pwrite", errno.ENOSPC, 1 + number % 3)
        try:
            carry_out(LocalStore(path, fs), plan.repairs[0])
        except (Killed, CheckpointError) as error:
            assert how == "killed" or isinstance(error, StorageFull)
        seen.append(file.read_bytes())
    assert set(seen) <= {damaged, good}
    assert damaged in seen
    assert run("repair", path).status == 0
    assert file.read_bytes() == good
