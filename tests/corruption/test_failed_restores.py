# SPDX-License-Identifier: Apache-2.0
"""A step that could not be restored is remembered beside the steps, until it is another one, or is found to be good."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

import shardckpt
from shardckpt.errors import ChecksumMismatch, IntegrityError
from shardckpt.failed_restores import DIRECTORY, FailedRestores
from shardckpt.failure import Failure
from shardckpt.maintain.listing import list_steps
from shardckpt.maintain.verify import verify
from shardckpt.manifest import manifest_digest
from shardckpt.pruning import Pruner
from shardckpt.store import LocalStore, open_store
from shardckpt.store.filesystem import FileSystem
from tests.cli.run import run
from tests.corruption.make import blocks_state, flip, holds, manifest_path, rank_file, save_steps, step_path

MIDDLE = 4096 + 200_000


class _Watching(FileSystem):
    """Knows which files were opened."""

    def __init__(self) -> None:
        self.opened: list[Path] = []

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        self.opened.append(Path(path))
        return super().open(path, flags, mode)

    def data_of(self) -> set[str]:
        """Steps of which data was read."""
        return {path.parent.name for path in self.opened if path.name.startswith("rank-")}


def restore(root: Path, state: dict[str, Any], **how: Any) -> tuple[shardckpt.Restored, set[str]]:
    """As a process does that was just started; also the steps of which it has read data."""
    fs = _Watching()

    class Injected(shardckpt.Checkpointer):
        @staticmethod
        def _open_store(url: str | os.PathLike[str]) -> LocalStore:
            return LocalStore(url, fs)

    with Injected(root) as ckpt:
        restored = ckpt.restore(state, **how)
    assert restored is not None
    return restored, fs.data_of()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with steps 1, 2 and 3, of which the last one is damaged."""
    save_steps(tmp_path / "run", 1, 2, 3)
    flip(rank_file(step_path(tmp_path / "run", 3)), MIDDLE)
    return tmp_path / "run"


def markers(root: Path) -> list[str]:
    """Names of the markers, as they stand on disk."""
    return sorted(path.name for path in (root / DIRECTORY).iterdir()) if (root / DIRECTORY).exists() else []


def fails(root: Path, **how: Any) -> None:
    with pytest.raises(ChecksumMismatch):
        restore(root, blocks_state(0), **how)


def test_a_crash_loop_tries_a_damaged_step_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    read = []
    for _ in range(5):
        state = blocks_state(0)
        restored, steps = restore(root, state, fallback=True)
        assert restored.step == 2
        assert holds(state, 2)
        assert [step for step, _ in restored.info.skipped] == [3]
        assert "ChecksumMismatch" in restored.info.skipped[0][1]
        read.append(sorted(steps))
    assert read == [["step-00000002", "step-00000003"]] + [["step-00000002"]] * 4
    assert caplog.text.count("is damaged, an older one is tried: ChecksumMismatch: ") == 1
    assert caplog.text.count("is skipped, as a restore of it has failed before: ChecksumMismatch: ") == 4


def test_a_failure_without_fallback_is_remembered_too(root: Path) -> None:
    fails(root)
    digest = manifest_digest(manifest_path(step_path(root, 3)).read_bytes())
    assert markers(root) == [f"step-00000003-{digest}.damaged"]
    fails(root)
    restored, steps = restore(root, blocks_state(0), fallback=True)
    assert (restored.step, steps) == (2, {"step-00000002"})


def test_a_part_that_fails_tells_of_the_step(root: Path) -> None:
    fails(root, keys=["first", "second"])
    assert restore(root, blocks_state(0), fallback=True)[1] == {"step-00000002"}
    # that a part of it can be read does not make it good
    assert restore(root, blocks_state(0), step=3, keys=["last"])[0].step == 3
    assert len(markers(root)) == 1


def test_a_damaged_manifest_is_remembered_by_its_bytes(root: Path) -> None:
    path = manifest_path(step_path(root, 2))
    flip(path, 77)
    assert restore(root, blocks_state(0), fallback=True)[0].step == 1
    assert restore(root, blocks_state(0), fallback=True)[1] == {"step-00000001"}
    flip(path, 77)
    restored, steps = restore(root, blocks_state(0), fallback=True)
    assert (restored.step, steps) == (2, {"step-00000002"})


def test_another_manifest_is_tried(root: Path) -> None:
    """The step was removed and saved again: what was remembered is not of this one."""
    fails(root)
    for path in step_path(root, 3).iterdir():
        path.unlink()
    save_steps(root, 3)
    state = blocks_state(0)
    restored, _ = restore(root, state, fallback=True)
    assert (restored.step, restored.info.skipped) == (3, ())
    assert markers(root) == []


def test_a_step_that_is_asked_for_is_tried(root: Path) -> None:
    fails(root)
    restored, steps = restore(root, blocks_state(0), step=3, fallback=True)
    assert (restored.step, steps) == (2, {"step-00000002", "step-00000003"})
    flip(rank_file(step_path(root, 3)), MIDDLE)
    assert restore(root, blocks_state(0), step=3)[0].step == 3
    assert markers(root) == []
    assert restore(root, blocks_state(0), fallback=True)[0].step == 3


def test_when_all_are_remembered_nothing_is_read(root: Path) -> None:
    for step in (1, 2):
        rank_file(step_path(root, step)).unlink()
    with pytest.raises(ChecksumMismatch):
        restore(root, blocks_state(0), fallback=True)
    with pytest.raises(IntegrityError, match=r"no step .*: step 3 \(ChecksumMismatch.*; step 2 \(MissingFile") as caught:
        restore(root, blocks_state(0), fallback=True)
    assert caught.value.tried == [3, 2, 1]


# ---- what ends it


def test_verify_with_all_data_ends_it(root: Path) -> None:
    fails(root)
    store = open_store(root)
    verify(store, read_data=True)
    assert len(markers(root)) == 1, "it is still damaged"
    flip(rank_file(step_path(root, 3)), MIDDLE)
    verify(store)
    assert len(markers(root)) == 1, "nobody has looked at the data"
    verify(store, read_data=True)
    assert markers(root) == []


def test_prune_ends_it_for_steps_that_are_gone(root: Path) -> None:
    fails(root)
    save_steps(root, 4, 5)
    run("prune", root, "--keep-last", "3")
    assert len(markers(root)) == 1
    run("prune", root, "--keep-last", "2", "--dry-run")
    assert len(markers(root)) == 1
    run("prune", root, "--keep-last", "2")
    assert markers(root) == []


def test_the_prune_after_a_save_ends_it(root: Path) -> None:
    fails(root)
    with shardckpt.Checkpointer(root, keep_last=2) as ckpt:
        ckpt.save(4, blocks_state(4), wait=True)
        assert len(markers(root)) == 1
        ckpt.save(5, blocks_state(5), wait=True)
        assert ckpt.steps() == [4, 5]
    assert markers(root) == []


# ---- what is known to be damaged takes no other's place


def test_prune_keeps_the_newest_step_that_is_intact(root: Path) -> None:
    fails(root)
    run("prune", root, "--keep-last", "1")
    state = blocks_state(0)
    restored, _ = restore(root, state, fallback=True)
    assert restored.step == 2
    assert holds(state, 2)
    assert [listed.step for listed in list_steps(open_store(root))] == [2, 3]


def test_the_prune_after_a_save_keeps_as_many_intact_steps(root: Path) -> None:
    with shardckpt.Checkpointer(root, keep_last=2) as ckpt:
        assert ckpt.restore(blocks_state(0), fallback=True) is not None
        ckpt.save(4, blocks_state(4), wait=True)
        assert ckpt.steps() == [2, 3, 4]


# ---- how it shows


def test_ls_shows_it(root: Path) -> None:
    assert [listed.state for listed in list_steps(open_store(root))] == ["committed"] * 3
    fails(root)
    listed = list_steps(open_store(root))
    assert [of_step.state for of_step in listed] == ["committed", "committed", "damaged"]
    assert listed[2].problem is not None
    assert listed[2].problem.startswith("a restore of it has failed: ChecksumMismatch: step-00000003/rank-00000-")
    assert "a restore of it has failed: ChecksumMismatch" in run("ls", root).out


# ---- what is found there need not be true


def marker_of(root: Path, step: int) -> Path:
    (root / DIRECTORY).mkdir(exist_ok=True)
    digest = manifest_digest(manifest_path(step_path(root, step)).read_bytes())
    return root / DIRECTORY / f"step-{step:08d}-{digest}.damaged"


HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"\x80\x04cos\nsystem\n",
    "not UTF-8": b'{"error":"\xff","message":""}',
    "other fields": b'{"error":"ChecksumMismatch","message":"x","run":"rm"}',
    "a list": b"[]",
    "deep nesting": b"[" * 16_000,
    "a long message": msgspec.json.encode({"error": "E", "message": "m" * 5000}),
    "much of it": b" " * (1 << 20),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_content_that_makes_no_sense(root: Path, content: bytes) -> None:
    marker_of(root, 2).write_bytes(content)
    restored, _ = restore(root, blocks_state(0), fallback=True)
    assert restored.step == 1
    assert dict(restored.info.skipped)[2] == "a restore failed; its marker does not tell why"
    assert "its marker does not tell why" in run("ls", root).out
    # it costs nobody the step
    assert restore(root, blocks_state(0), step=2)[0].step == 2


def test_content_cannot_steer_a_terminal(root: Path) -> None:
    marker_of(root, 2).write_bytes(msgspec.json.encode({"error": "\x1b[2J", "message": "a\nb\u202e"}))
    assert list_steps(open_store(root))[1].problem == "a restore of it has failed: \\x1b[2J: a\\nb\\u202e"


def test_other_names_are_passed_over(root: Path) -> None:
    good = marker_of(root, 2)
    names = [
        "x",
        "step-00000002.damaged",
        "step-2-" + "0" * 64 + ".damaged",
        good.name.upper(),
        good.name + ".tmp",
        "a/" + good.name,
    ]
    for name in names:
        path = root / DIRECTORY / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    good.with_name(f"step-00000002-{'0' * 64}.damaged").symlink_to("/etc/passwd")
    assert [failed.digest for failed in FailedRestores(open_store(root)).entries()] == []
    restored, _ = restore(root, blocks_state(0), fallback=True)
    assert restored.step == 2


def test_a_place_where_nothing_can_be_put(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / DIRECTORY).write_bytes(b"")
    with caplog.at_level(logging.WARNING, "shardckpt"):
        assert restore(root, blocks_state(0), fallback=True)[0].step == 2
    assert "could not remember that step 3 is damaged" in caplog.text


def test_a_marker_is_never_overwritten(root: Path) -> None:
    memory = FailedRestores(open_store(root))
    for message in ("first", "second"):
        memory.remember(7, "0" * 64, Failure("MissingFile", message, {}))
    (failed,) = memory.entries()
    assert memory.reason(failed) == "MissingFile: first"
    memory.remember(7, "1" * 64, Failure("E" * 1000, "m" * 100_000, {}))
    assert len(memory.reason(memory.entries()[1])) == 100 + 2 + 2000
    memory.forget(6)
    assert len(memory.entries()) == 2
    memory.forget(7)
    assert memory.entries() == []


def test_steps_are_asked_for_only_when_something_is_remembered(root: Path) -> None:
    def steps() -> list[int]:
        raise AssertionError("there is nothing to forget")

    FailedRestores(open_store(root)).forget_all_but(steps)
    fails(root)
    Pruner(open_store(root)).forget_gone()
    assert len(markers(root)) == 1
