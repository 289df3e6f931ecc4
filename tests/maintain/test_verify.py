# SPDX-License-Identifier: Apache-2.0
"""Verification: what is whole passes, every kind of damage is found, and all of it at once."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import shardckpt
from shardckpt.buffer import CHUNK
from shardckpt.errors import CheckpointNotFound, ConfigError
from shardckpt.failed_restores import FailedRestores
from shardckpt.failure import describe
from shardckpt.maintain.subset import EVERYTHING, Portion, Subset
from shardckpt.maintain.verify import Problem, verify
from shardckpt.manifest import HEADER_ALIGNMENT, MANIFEST_NAME
from shardckpt.store import LocalStore, open_store
from shardckpt.store.filesystem import FileSystem
from shardckpt.validate import parse_manifest
from tests.engine.simulate import resealed
from tests.maintain.make import flip, opened, rank_file

BLOCK = 64 << 10
BLOCKS = 8


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of three tensors: ``a`` fills two blocks, ``b`` five, ``c`` a part of the last one."""
    state = {"a": torch.zeros(2, BLOCK // 8, dtype=torch.float64), "b": torch.zeros(5, BLOCK // 4), "c": torch.ones(5).half()}
    shardckpt.save(tmp_path, state)
    assert opened(tmp_path).checkpoint.plan.block_size == BLOCK
    return tmp_path


def problems(path: Path, *, read_data: bool = False) -> list[Problem]:
    (found,) = verify(open_store(path), read_data=read_data)
    assert found.ok == (not found.problems)
    return list(found.problems)


def data_start(path: Path) -> int:
    return opened(path).checkpoint.manifest.files[0].data


@pytest.mark.parametrize("read_data", [False, True])
def test_what_was_saved_is_fine(everywhere: dict[str, Path], read_data: bool) -> None:
    for path in everywhere.values():
        (found,) = verify(open_store(path), read_data=read_data)
        assert found.ok
        plan = opened(path).checkpoint.plan
        assert found.files == plan.world_size
        assert found.bytes == sum(file.stat().st_size for file in path.glob("rank-*"))
        assert found.bytes_read == (plan.total_bytes if read_data else 0)


@pytest.mark.parametrize(
    ("at", "blocks", "tensors"),
    [
        (0, (0, 1), ("a",)),
        (2 * BLOCK - 1, (1, 2), ("a",)),
        (2 * BLOCK, (2, 3), ("b",)),
        (7 * BLOCK, (7, 8), ("c",)),
    ],
)
def test_a_flipped_bit_of_data(saved: Path, at: int, blocks: tuple[int, int], tensors: tuple[str, ...]) -> None:
    data = data_start(saved)
    flip(rank_file(saved), data + at)
    assert problems(saved) == []
    (problem,) = problems(saved, read_data=True)
    assert problem.kind == "ChecksumMismatch"
    assert problem.file == rank_file(saved).name
    stop = min(data + blocks[1] * BLOCK, rank_file(saved).stat().st_size)
    assert (problem.start, problem.stop) == (data + blocks[0] * BLOCK, stop)
    assert problem.tensors == tensors


def test_neighbouring_blocks_are_one_problem_and_others_are_not(saved: Path) -> None:
    data = data_start(saved)
    for block in (1, 2, 3, 6):
        flip(rank_file(saved), data + block * BLOCK)
    found = problems(saved, read_data=True)
    assert [(p.start, p.stop, p.tensors) for p in found] == [
        (data + BLOCK, data + 4 * BLOCK, ("a", "b")),
        (data + 6 * BLOCK, data + 7 * BLOCK, ("b",)),
    ]


@pytest.mark.parametrize("at", [0, 8, 40])
def test_a_flipped_bit_of_a_header(saved: Path, at: int) -> None:
    flip(rank_file(saved), at)
    (problem,) = problems(saved)
    assert problem.kind == "ChecksumMismatch"
    assert (problem.start, problem.stop) == (at, at + 1)
    assert "header" in problem.message


def test_a_header_of_another_plan(saved: Path) -> None:
    """Header and digest agree with each other, but not with the manifest."""
    change_manifest(saved, lambda text: text.replace(b'"c":{"dtype":"float16"', b'"c":{"dtype":"bfloat16"'))
    (problem,) = problems(saved)
    assert problem.kind == "InvalidManifest"
    assert "header" in problem.message


def test_a_wrong_header_digest(saved: Path) -> None:
    digest = opened(saved).checkpoint.manifest.files[0].header
    other = "0" * 16 if digest != "0" * 16 else "1" * 16
    change_manifest(saved, lambda text: text.replace(digest.encode(), other.encode()))
    (problem,) = problems(saved)
    assert problem.kind == "InvalidManifest"


@pytest.mark.parametrize("missing", [1, 5, 10, BLOCK, 6 * BLOCK])
def test_a_truncated_file(saved: Path, missing: int) -> None:
    file, data = rank_file(saved), data_start(saved)
    size = file.stat().st_size
    flip(file, data + 1)
    os.truncate(file, size - missing)
    truncated, damaged = problems(saved, read_data=True)
    assert truncated.kind == "TruncatedFile"
    assert (truncated.start, truncated.stop) == (size - missing, size)
    assert truncated.tensors == (("c",) if missing <= 10 else ("b", "c") if missing == BLOCK else ("a", "b", "c"))
    assert (damaged.kind, damaged.start) == ("ChecksumMismatch", data)


def test_a_file_cut_inside_its_header(saved: Path) -> None:
    os.truncate(rank_file(saved), 100)
    (problem,) = problems(saved, read_data=True)
    assert problem.kind == "TruncatedFile"
    assert problem.tensors == ("a", "b", "c")


def test_a_file_that_grew(saved: Path) -> None:
    with rank_file(saved).open("ab") as file:
        file.write(b"more")
    (problem,) = problems(saved, read_data=True)
    assert problem.kind == "IntegrityError"
    assert problem.stop is not None
    assert problem.start == problem.stop - 4
    assert problem.tensors == ()


def remove(path: Path) -> None:
    path.unlink()


def replace_by_link(path: Path) -> None:
    path.rename(path.with_name("other"))
    path.symlink_to("other")


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [remove, replace_by_link, replace_by_fifo, replace_by_directory])
def test_a_file_that_is_no_file(saved: Path, damage: Callable[[Path], None]) -> None:
    file = rank_file(saved)
    size = file.stat().st_size
    damage(file)
    (problem,) = problems(saved, read_data=True)
    assert problem.kind == ("MissingFile" if damage is remove else "StoreError")
    assert (problem.file, problem.start, problem.stop) == (file.name, 0, size)
    assert problem.tensors == ("a", "b", "c")


def test_all_files_are_looked_at(everywhere: dict[str, Path], tmp_path: Path) -> None:
    path = shutil.copytree(everywhere["columns"], tmp_path / "copy")
    rank_file(path, 0).unlink()
    flip(rank_file(path, 1), -1)
    flip(rank_file(path, 2), 20)
    os.truncate(rank_file(path, 3), 4096)
    assert [(p.kind, p.file[:10]) for p in problems(path, read_data=True)] == [
        ("MissingFile", "rank-00000"),
        ("ChecksumMismatch", "rank-00001"),
        ("ChecksumMismatch", "rank-00002"),
        ("TruncatedFile", "rank-00003"),
    ]


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (lambda text: text[:-1], "InvalidManifest"),
        (lambda text: resealed(text.replace(b'"version":1', b'"version":9')), "UnsupportedVersion"),
        (lambda text: b"", "InvalidManifest"),
    ],
)
def test_a_damaged_manifest(saved: Path, damage: Callable[[bytes], bytes], kind: str) -> None:
    manifest = saved / MANIFEST_NAME
    manifest.write_bytes(damage(manifest.read_bytes()))
    (problem,) = problems(saved)
    assert (problem.kind, problem.file, problem.start, problem.tensors) == (kind, MANIFEST_NAME, None, ())


def test_a_root_is_verified_step_by_step(tmp_path: Path) -> None:
    with shardckpt.Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, {"x": torch.arange(4)}, wait=True)
    flip(tmp_path / "step-00000001" / MANIFEST_NAME, 3)
    flip(rank_file(tmp_path / "step-00000003"), -1)
    (tmp_path / "step-00000009").mkdir()
    shutil.copy(rank_file(tmp_path / "step-00000002"), tmp_path / "step-00000009")
    told: list[tuple[int, int]] = []
    found = verify(open_store(tmp_path), read_data=True, progress=lambda done, total: told.append((done, total)))
    assert [(v.path, v.step, v.ok) for v in found] == [
        (str(tmp_path / "step-00000001"), None, False),
        (str(tmp_path / "step-00000002"), 2, True),
        (str(tmp_path / "step-00000003"), 3, False),
    ]
    assert [p.file for v in found for p in v.problems] == [
        "step-00000001/manifest.json",
        f"step-00000003/{rank_file(tmp_path / 'step-00000003').name}",
    ]
    assert told[-1] == (64, 64)


def test_progress_ends_at_the_total_whatever_is_missing(saved: Path) -> None:
    os.truncate(rank_file(saved), data_start(saved) + 3 * BLOCK + 5)
    told: list[tuple[int, int]] = []
    verify(open_store(saved), read_data=True, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (7 * BLOCK + 10,) * 2


class BadSector(FileSystem):
    """A disk that cannot read the third chunk of a file."""

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset == HEADER_ALIGNMENT + 2 * CHUNK:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().preadv(fd, buffers, offset)


def test_a_read_error_is_a_problem_of_what_could_not_be_read(tmp_path: Path) -> None:
    shardckpt.save(tmp_path, {"a": torch.zeros(3, CHUNK // 4), "b": torch.zeros(CHUNK // 4)})
    (found,) = verify(LocalStore(tmp_path, fs=BadSector()), read_data=True)
    (problem,) = found.problems
    assert problem.kind == "StoreError"
    assert (problem.start, problem.stop) == (HEADER_ALIGNMENT + 2 * CHUNK, HEADER_ALIGNMENT + 3 * CHUNK)
    assert problem.tensors == ("a",)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound):
        verify(open_store(tmp_path / "nothing"))


def change_manifest(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the text of a manifest in a way that stays canonical and valid."""
    manifest = path / MANIFEST_NAME
    before = manifest.read_bytes()
    after = resealed(change(before))
    assert after != before
    parse_manifest(after)
    manifest.write_bytes(after)


# ---- roots, parts of the data, memory


def test_a_renamed_step_is_found(tmp_path: Path) -> None:
    with shardckpt.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, {"x": torch.arange(4)}, wait=True)
    (tmp_path / "step-00000003").rename(tmp_path / "step-00000004")
    (problem,) = problems(tmp_path)
    assert (problem.kind, problem.file) == ("InvalidManifest", "step-00000004/manifest.json")
    assert "of step 3, and its directory is step-00000004" in problem.message


def test_several_damages_of_one_checkpoint_are_all_told(saved: Path) -> None:
    data = data_start(saved)
    flip(rank_file(saved), 50)
    for block in (0, 2, 5):
        flip(rank_file(saved), data + block * BLOCK)
    os.truncate(rank_file(saved), rank_file(saved).stat().st_size - 1)
    assert [(p.kind, p.start) for p in problems(saved, read_data=True)] == [
        ("TruncatedFile", rank_file(saved).stat().st_size),
        ("ChecksumMismatch", 50),
        *(("ChecksumMismatch", data + block * BLOCK) for block in (0, 2, 5)),
    ]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of seven chunks and a bit."""
    path = tmp_path_factory.mktemp("wide")
    shardckpt.save(path, {"a": torch.zeros(7 * CHUNK + 8, dtype=torch.uint8)})
    return path


@pytest.mark.parametrize("parts", [1, 2, 3, 8, 20])
def test_all_parts_together_are_all_of_the_data(wide: Path, parts: int) -> None:
    total = opened(wide).checkpoint.plan.total_bytes
    runs = [verify(open_store(wide), read_data=True, subset=Subset.parse(f"{n}/{parts}"))[0] for n in range(1, parts + 1)]
    assert [run.ok for run in runs] == [True] * parts
    assert {run.data_bytes for run in runs} == {total}
    assert sum(run.bytes_read for run in runs) == total
    assert max(run.bytes_read for run in runs) <= -(-8 // parts) * CHUNK


def test_each_damage_is_in_one_part(wide: Path, tmp_path: Path) -> None:
    path = shutil.copytree(wide, tmp_path / "copy")
    for chunk in (1, 6):
        flip(rank_file(path), data_start(path) + chunk * CHUNK + 17)
    runs = [verify(open_store(path), read_data=True, subset=Subset.parse(f"{n}/4"))[0] for n in (1, 2, 3, 4)]
    found = [problem.start or 0 for run in runs for problem in run.problems]
    assert sorted(found) == [problem.start for problem in problems(path, read_data=True)]
    assert len(found) == 2


def test_a_share_is_random_and_can_be_repeated(wide: Path) -> None:
    plan = opened(wide).checkpoint.plan

    def chosen(text: str, seed: int, attempt: str = "a" * 16) -> list[tuple[int, int]]:
        return Portion(plan, attempt, Subset.parse(text, seed), CHUNK).chunks(0)

    assert [len(chosen(text, 1)) for text in ("0.1%", "12.5%", "13%", "50%", "99.9%", "100%")] == [1, 1, 2, 4, 8, 8]
    assert all(chosen("30%", seed) == chosen("30%", seed) for seed in range(5))
    everywhere = {extent for seed in range(40) for extent in chosen("30%", seed)}
    assert everywhere == set(chosen("100%", 0))
    assert any(chosen("30%", 1, f"{number:016x}") != chosen("30%", 1) for number in range(10))
    (found,) = verify(open_store(wide), read_data=True, subset=Subset.parse("50%", 3))
    assert found.bytes_read == sum(stop - start for start, stop in chosen("50%", 3, opened(wide).checkpoint.manifest.attempt))


@pytest.mark.parametrize("text", ["", "5", "0%", "-1%", "100.1%", "0/3", "4/3", "1/0", "1/2/3", "five%", "5 %", "\u0665%"])
def test_what_is_no_part_of_the_data(text: str) -> None:
    with pytest.raises(ConfigError, match="is no part of the data: give a share above 0% and up to 100%"):
        Subset.parse(text)


def test_progress_of_a_part_ends_at_its_total(wide: Path) -> None:
    told: list[tuple[int, int]] = []
    subset = Subset.parse("2/4")
    verify(open_store(wide), read_data=True, subset=subset, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] <= 2 * CHUNK


def test_a_failed_restore_is_forgotten_only_when_all_data_is_good(tmp_path: Path) -> None:
    with shardckpt.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, {"x": torch.arange(4)}, wait=True)
    store = open_store(tmp_path)
    FailedRestores(store).remember(3, opened(tmp_path).checkpoint.digest, describe(shardckpt.ChecksumMismatch("no")))
    for subset, left in ((Subset.parse("1/1000"), 1), (EVERYTHING, 0)):
        verify(store, read_data=True, subset=subset)
        assert len(FailedRestores(store).entries()) == left
