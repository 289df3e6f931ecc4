# SPDX-License-Identifier: Apache-2.0
"""Storage that fills up, refuses, disappears or is replaced while two ranks save to it: real file systems where possible.

Every rank gets the same error, what was committed before stays, nothing of the attempt is left, and when the trouble is over
the same `Checkpointer` goes on.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt import Options
from shardckpt.errors import CheckpointError, MissingFile, NotACheckpointRoot, StorageFull, StoreError
from tests.engine.stores import checkpointer, files
from tests.engine.test_process import background_process
from tests.ranks import RankPool, meet
from tests.store.faults import FaultyFileSystem

PATIENCE = 120.0
MIB = 1 << 20
DISK = 9 * MIB
"""Room for three checkpoints and a half."""
SPARE = MIB // 4
"""What a save takes beside its data: a manifest, and markers of the journal."""

modes = pytest.mark.parametrize("mode", ["blocking", "thread", pytest.param("process", marks=pytest.mark.slow)])
moments = pytest.mark.parametrize("moment", ["before", "while"])


@dataclasses.dataclass(frozen=True)
class Found:
    """What one rank saw."""

    error: CheckpointError | None
    """Of save 3, in which the trouble came."""
    left: list[str]
    """Files in the directories of steps after it."""
    restored: tuple[int, int] | None
    """Step, and value that this rank found in it, while the trouble went on."""
    later: int
    """Step that was saved when it was over."""


# ---- on the ranks


def a_part(step: int) -> dict[str, Any]:
    """One MiB of each rank's own."""
    return {"own": shardckpt.PerRank(torch.full((MIB // 4,), 10 * step + dist.get_rank(), dtype=torch.int32))}


class Meddling(FaultyFileSystem):
    """Lets something happen when this rank is about to write its data, or to commit."""

    def __init__(self) -> None:
        super().__init__()
        self.meddle: Callable[[], None] | None = None
        self.meddle_at_commit: Callable[[], None] | None = None

    def link(self, source: str, target: str) -> None:
        if target.endswith("manifest.json") and self.meddle_at_commit is not None:
            meddle, self.meddle_at_commit = self.meddle_at_commit, None
            meddle()
        super().link(source, target)

    def pwrite(self, fd: int, buffer: memoryview, offset: int) -> int:
        if offset and self.meddle is not None:
            meddle, self.meddle = self.meddle, None
            meddle()
        return super().pwrite(fd, buffer, offset)


def fill(root: Path) -> None:
    with (root.parent / "ballast").open("wb", buffering=0) as ballast:
        try:
            for size in (MIB, 4096):
                while ballast.write(bytes(size)) == size:
                    pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
            assert shutil.disk_usage(root).free < 4096


def make_room_by_pruning(root: Path) -> None:
    """As much as one checkpoint takes, and no more: so what is left of another attempt would be too much."""
    shutil.rmtree(root / "step-00000001")
    ballast = root.parent / "ballast"
    os.truncate(ballast, ballast.stat().st_size - SPARE)


def remount(mode: str, root: Path) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", root.parent], check=True)


def replace_by_file(root: Path) -> None:
    shutil.rmtree(root)
    root.write_text("mine")


TROUBLES: dict[str, Callable[[Path], None]] = {
    "full": fill,
    "read-only": lambda root: remount("ro", root),
    "step removed": lambda root: shutil.rmtree(root / "step-00000003"),
    "root removed": shutil.rmtree,
    "root replaced": replace_by_file,
}
"""What rank 0 does to the root."""
CURES: dict[str, Callable[[Path], object]] = {
    "full": make_room_by_pruning,
    "read-only": lambda root: remount("rw", root),
    "root replaced": lambda root: root.unlink(),
}


def on_rank_0(action: Callable[[Path], object] | None, root: Path, when: str) -> None:
    """All ranks wait for it."""
    meet(f"{when}, and before")
    if dist.get_rank() == 0 and action is not None:
        action(root)
    meet(when)


def restored_value(ckpt: shardckpt.Checkpointer) -> tuple[int, int] | None:
    target = a_part(0)
    try:
        restored = ckpt.restore(target)
    except NotACheckpointRoot:
        return None
    return None if restored is None else (restored.step, int(target["own"].value.unique().item()))


def save_in_trouble(root: str, mode: str, moment: str, trouble: str) -> Found:
    """Saves 1 and 2 succeed, save 3 does not, and save 4 does."""
    place, fs = Path(root), Meddling()

    def meddle() -> None:
        on_rank_0(TROUBLES[trouble], place, "trouble")

    def save_3() -> None:
        meet("save 3")
        if moment == "before":
            meddle()
        elif mode == "process":
            background_process().suspend()
        elif moment == "commit":
            # rank 0 alone: the others have sent their receipts
            fs.meddle_at_commit = lambda: TROUBLES[trouble](place)
        else:
            fs.meddle = meddle
        handle = ckpt.save(3, a_part(3), wait=mode == "blocking")
        if moment == "while" and mode == "process":
            handle.wait_staged(PATIENCE)
            meddle()
            background_process().resume()
        handle.result(PATIENCE)

    options = Options(background="process", timeout=PATIENCE)
    with shardckpt.Checkpointer(root, options=options) if mode == "process" else checkpointer(root, fs) as ckpt:
        for step in (1, 2):
            ckpt.save(step, a_part(step)).result(PATIENCE)
        error = error_of(save_3)
        meet("failed")
        left = [name for name in files(root) if not name.startswith(("step-00000001", "step-00000002"))]
        restored = restored_value(ckpt)
        on_rank_0(CURES.get(trouble), place, "cure")
        return Found(error, left, restored, ckpt.save(4, a_part(4)).result(PATIENCE).step)


def error_of(call: Callable[[], object]) -> CheckpointError | None:
    try:
        call()
    except CheckpointError as error:
        return error
    return None


def require_intact(root: Path, steps: list[int], world_size: int = 2) -> None:
    """These steps are there with their values, and no others."""
    with shardckpt.Checkpointer(root) as ckpt:
        assert ckpt.steps() == steps
    for step in steps:
        own = shardckpt.load(root / f"step-{step:08}").state["own"]
        assert {rank: value.unique().tolist() for rank, value in own.items()} == {
            rank: [10 * step + rank] for rank in range(world_size)
        }


# ---- a small disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@modes
@moments
def test_a_full_disk(ranks: RankPool, disk: Path, mode: str, moment: str) -> None:
    found = ranks.run(2, save_in_trouble, str(disk / "root"), mode, moment, "full", timeout=250)
    for rank, seen in enumerate(found):
        assert isinstance(seen.error, StorageFull)
        assert seen.error.errno == "ENOSPC"
        assert "No space left on device (ENOSPC); free space there, or prune older checkpoints" in seen.error.message
        assert seen.left == []
        assert seen.restored == (2, 20 + rank)
        assert seen.later == 4
    require_intact(disk / "root", [2, 4])


@modes
def test_a_disk_that_becomes_read_only(ranks: RankPool, disk: Path, mode: str) -> None:
    """It can still be restored from."""
    found = ranks.run(2, save_in_trouble, str(disk / "root"), mode, "before", "read-only", timeout=250)
    for rank, seen in enumerate(found):
        assert isinstance(seen.error, StoreError)
        assert seen.error.errno == "EROFS"
        assert "mounted read-only: remount it or choose another root" in seen.error.message
        assert seen.left == []
        assert seen.restored == (2, 20 + rank)
        assert seen.later == 4
    require_intact(disk / "root", [1, 2, 4])


# ---- directories that others remove or replace


@pytest.mark.parametrize("mode", ["blocking", "thread"])
@pytest.mark.parametrize(
    ("trouble", "kind", "restores", "steps"),
    [
        ("step removed", MissingFile, True, [1, 2, 4]),
        ("root removed", MissingFile, False, [4]),
        ("root replaced", NotACheckpointRoot, False, [4]),
    ],
)
@pytest.mark.parametrize("moment", ["while", "commit"])
def test_a_directory_that_is_removed_while_ranks_save(
    ranks: RankPool,
    tmp_path: Path,
    mode: str,
    moment: str,
    trouble: str,
    kind: type[CheckpointError],
    restores: bool,
    steps: list[int],
) -> None:
    """While they write, both find out by themselves when they flush it."""
    root = tmp_path / "root"
    found = ranks.run(2, save_in_trouble, str(root), mode, moment, trouble, timeout=250)
    for rank, seen in enumerate(found):
        assert type(seen.error) is kind
        assert str(root) in str(seen.error)
        assert seen.left == []
        assert seen.restored == ((2, 20 + rank) if restores else None)
        assert seen.later == 4
    require_intact(root, steps)


# ---- limits of one rank


@contextmanager
def small_files() -> Iterator[None]:
    """The system does not let this process write files of a MiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB // 2, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_beyond_a_limit(root: str, limit: str, limited: int, wait: bool) -> Found:
    """Save 2 is too large for one rank."""
    fs = FaultyFileSystem()
    with checkpointer(root, fs) as ckpt:
        ckpt.save(1, a_part(1), wait=True)
        if dist.get_rank() == limited and limit == "quota":
            fs.fail("pwrite", errno.EDQUOT)
        with small_files() if dist.get_rank() == limited and limit == "files" else nullcontext():
            error = error_of(lambda: ckpt.save(2, a_part(2), wait=wait).result(PATIENCE))
        meet("failed")
        left = [name for name in files(root) if not name.startswith("step-00000001")]
        restored = restored_value(ckpt)
        return Found(error, left, restored, ckpt.save(3, a_part(3), wait=wait).result(PATIENCE).step)


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("limited", [0, 1])
@pytest.mark.parametrize(
    ("limit", "kind", "code", "advice"),
    [
        ("files", StoreError, "EFBIG", "`ulimit -f` does not allow files of this size"),
        ("quota", StorageFull, "EDQUOT", "free quota there, or prune older checkpoints"),
    ],
)
def test_a_limit_that_one_rank_has(
    ranks: RankPool, tmp_path: Path, limit: str, kind: type[StoreError], code: str, advice: str, limited: int, wait: bool
) -> None:
    root = tmp_path / "root"
    for rank, seen in enumerate(ranks.run(2, save_beyond_a_limit, str(root), limit, limited, wait)):
        assert type(seen.error) is kind
        assert seen.error.errno == code
        assert advice in str(seen.error)
        if rank != limited:
            assert seen.error.rank == limited
        assert seen.left == []
        assert seen.restored == (1, 10 + rank)
        assert seen.later == 3
    require_intact(root, [1, 3])


def save_without_permission(root: str) -> tuple[CheckpointError | None, list[str]]:
    """As a user who may not write there, which root always may."""
    place = Path(root)
    with shardckpt.Checkpointer(root) as ckpt:
        ckpt.save(1, a_part(1), wait=True)
        place.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            error = error_of(lambda: ckpt.save(2, a_part(2), wait=True))
        finally:
            os.seteuid(user)
            place.chmod(0o755)
        left = files(root)
        ckpt.save(3, a_part(3), wait=True)
    return error, left


def test_a_directory_that_may_not_be_written(ranks: RankPool) -> None:
    """Nobody but its owner may look into a folder of pytest, so this one has another place."""
    place = Path(tempfile.mkdtemp(prefix="shardckpt-"))
    try:
        place.chmod(0o755)
        ((error, left),) = ranks.run(1, save_without_permission, str(place / "root"), fresh=True)
        assert type(error) is StoreError
        assert error.errno == "EACCES"
        assert "check owner and mode of the path" in str(error)
        assert {name[:13] for name in left} == {"step-00000001"}
        require_intact(place / "root", [1, 3], world_size=1)
    finally:
        shutil.rmtree(place)
