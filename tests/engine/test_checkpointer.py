# SPDX-License-Identifier: Apache-2.0
"""`Checkpointer`: steps come and go as the options say, the newest is restored, and nothing surprises."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt.errors import (
    AlreadyCommitted,
    CheckpointerClosed,
    CheckpointNotFound,
    ConfigError,
    MissingNames,
    NotACheckpointRoot,
)
from tests.ranks import RankPool


def a_state(step: int) -> dict[str, Any]:
    return {"t": torch.full((3,), float(step)), "step": step}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_an_empty_root_has_nothing_to_restore(root: Path) -> None:
    with shardckpt.Checkpointer(root) as ckpt:
        state = a_state(1)
        assert ckpt.restore(state) is None
        assert ckpt.steps() == []
        assert state["step"] == 1
        with pytest.raises(CheckpointNotFound, match=r"step 3 is not committed in .*; committed are none"):
            ckpt.restore(state, step=3)
    assert not root.exists()


def test_the_newest_step_is_restored(root: Path) -> None:
    with shardckpt.Checkpointer(root) as ckpt:
        for step in (10, 5, 20, 15):
            ckpt.save(step, a_state(step), metadata={"loss": step / 2}, wait=True)
        assert ckpt.steps() == [5, 10, 15, 20]
        state = a_state(0)
        restored = ckpt.restore(state)
        assert restored is not None
        assert (restored.step, state["step"], state["t"].tolist()) == (20, 20, [20.0] * 3)
        assert restored.info.metadata == {"loss": 10.0}
        again = ckpt.restore(state, step=5)
        assert again is not None
        assert (again.step, state["step"], state["t"].tolist()) == (5, 5, [5.0] * 3)
        with pytest.raises(
            CheckpointNotFound, match=r"step 6 is not committed in .*; committed are \[5, 10, 15, 20\]"
        ) as caught:
            ckpt.restore(state, step=6)
        assert caught.value.steps == [5, 10, 15, 20]


def test_a_new_process_goes_on_where_the_last_one_stopped(root: Path) -> None:
    for session in range(3):
        with shardckpt.Checkpointer(root) as ckpt:
            state = a_state(0)
            restored = ckpt.restore(state)
            first = restored.step + 1 if restored else 0
            assert first == 2 * session
            for step in (first, first + 1):
                ckpt.save(step, a_state(step), wait=True)


def test_attempts_without_a_manifest_are_not_steps(root: Path) -> None:
    with shardckpt.Checkpointer(root) as ckpt:
        ckpt.save(1, a_state(1), wait=True)
        ckpt.save(2, a_state(2), wait=True)
        (root / "step-00000002" / "manifest.json").unlink()
        assert ckpt.steps() == [1]
        restored = ckpt.restore(a_state(0))
        assert restored is not None
        assert restored.step == 1
        ckpt.save(2, a_state(2), wait=True)
        assert ckpt.steps() == [1, 2]
        assert shardckpt.load(root).state["step"] == 2


def test_a_damaged_newest_step_is_not_passed_over(root: Path) -> None:
    """An older one is restored only when it is asked for."""
    with shardckpt.Checkpointer(root) as ckpt:
        for step in (1, 2):
            ckpt.save(step, a_state(step), wait=True)
        manifest = root / "step-00000002" / "manifest.json"
        manifest.write_bytes(manifest.read_bytes()[:-10])
        state = a_state(0)
        with pytest.raises(shardckpt.InvalidManifest):
            ckpt.restore(state)
        assert state["step"] == 0
        restored = ckpt.restore(state, step=1)
        assert restored is not None
        assert state["step"] == 1


# ---- retention


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6]),
        ({"keep_last": 1}, [6]),
        ({"keep_last": 3}, [4, 5, 6]),
        ({"keep_last": 2, "keep_every": 3}, [0, 3, 5, 6]),
        ({"keep_last": 50}, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_old_steps_go(root: Path, options: dict[str, int], left: list[int]) -> None:
    with shardckpt.Checkpointer(root, keep_last=options.get("keep_last"), keep_every=options.get("keep_every")) as ckpt:
        for step in range(7):
            ckpt.save(step, a_state(step), wait=True)
        assert ckpt.steps() == left
        assert sorted(path.name for path in root.iterdir()) == [f"step-{step:08}" for step in left]
        for step in left:
            assert shardckpt.load(root / f"step-{step:08}").state["step"] == step


def test_a_step_saved_out_of_order_is_not_pruned_by_its_own_save(root: Path) -> None:
    with shardckpt.Checkpointer(root, keep_last=1) as ckpt:
        ckpt.save(100, a_state(100), wait=True)
        ckpt.save(50, a_state(50), wait=True)
        assert ckpt.steps() == [50, 100]
        ckpt.save(101, a_state(101), wait=True)
        assert ckpt.steps() == [101]


def test_a_failed_save_prunes_nothing(root: Path) -> None:
    with shardckpt.Checkpointer(root, keep_last=1) as ckpt:
        ckpt.save(1, a_state(1), wait=True)
        with pytest.raises(shardckpt.UnsupportedLeaf):
            ckpt.save(2, {"f": open}, wait=True)
        assert ckpt.steps() == [1]


def test_a_prune_that_fails_is_logged_and_the_save_stands(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with shardckpt.Checkpointer(root, keep_last=1) as ckpt:
        ckpt.save(1, a_state(1), wait=True)
        # a directory in the place of a file cannot be unlinked, whoever tries
        file = next((root / "step-00000001").glob("rank-*"))
        file.unlink()
        (root / "step-00000001" / "manifest.json").unlink()
        (root / "step-00000001" / "manifest.json").symlink_to("/nowhere/at/all")
        with caplog.at_level(logging.WARNING, "shardckpt"):
            ckpt.save(2, a_state(2), wait=True)
        assert ckpt.steps() == [2]


def test_other_things_in_a_root_are_left_alone(root: Path) -> None:
    with shardckpt.Checkpointer(root, keep_last=1) as ckpt:
        ckpt.save(1, a_state(1), wait=True)
        (root / "notes.txt").write_text("mine")
        (root / "step-1").mkdir()
        (root / "step-00000001" / "mine.txt").write_text("mine")
        ckpt.save(2, a_state(2), wait=True)
        assert ckpt.steps() == [2]
    left = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    assert left[:2] == ["notes.txt", "step-00000001/mine.txt"]
    assert all(name.startswith("step-00000002/") for name in left[2:])


@pytest.mark.parametrize("options", [{"keep_last": 0}, {"keep_every": 2}, {"keep_last": "3"}])
def test_bad_retention_is_refused_at_once(root: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        shardckpt.Checkpointer(root, **options)


# ---- the life of a Checkpointer


def test_a_closed_checkpointer_says_so(root: Path) -> None:
    ckpt = shardckpt.Checkpointer(root)
    ckpt.save(1, a_state(1), wait=True)
    ckpt.close()
    ckpt.close()
    for call in (lambda: ckpt.save(2, a_state(2), wait=True), lambda: ckpt.restore(a_state(0)), ckpt.__enter__):
        with pytest.raises(CheckpointerClosed, match="is closed; make a new one"):
            call()
    assert ckpt.steps() == [1]


def test_an_error_in_the_block_closes_it_too(root: Path) -> None:
    with pytest.raises(ZeroDivisionError), shardckpt.Checkpointer(root) as ckpt:
        ckpt.save(1, a_state(1), wait=True)
        print(1 // 0)
    with pytest.raises(CheckpointerClosed):
        ckpt.save(2, a_state(2), wait=True)
    assert shardckpt.load(root).step == 1


def test_handles(root: Path) -> None:
    with shardckpt.Checkpointer(root) as ckpt:
        handle = ckpt.save(1, a_state(1))
        handle.wait_staged()
        saved = handle.result(timeout=60)
        assert handle.done()
        assert handle.result() is saved
        assert saved.step == 1
        assert saved.url == str(root / "step-00000001")
        assert shardckpt.load(saved.url, expect_digest=saved.digest).step == 1
        assert ckpt.url == str(root)


def test_a_step_is_saved_once(root: Path) -> None:
    with shardckpt.Checkpointer(root) as first, shardckpt.Checkpointer(root) as second:
        first.save(1, a_state(1), wait=True)
        for ckpt in (first, second):
            with pytest.raises(AlreadyCommitted, match="save another step, or remove that one first"):
                ckpt.save(1, a_state(7), wait=True)
        second.save(2, a_state(2), wait=True)
        assert first.steps() == [1, 2]
        assert shardckpt.load(root / "step-00000001").state["step"] == 1


def test_the_structure_may_change_between_saves(root: Path) -> None:
    states: list[dict[str, Any]] = [
        {"a": torch.ones(3)},
        {"a": torch.ones(4), "b": [torch.ones(2)]},
        {"b": (torch.ones(2, dtype=torch.int8),)},
        {"b": 3},
        {"a": torch.ones(3)},
        # each differs from the one before in one respect only
        {"a": torch.ones(3, dtype=torch.int32)},
        {"a": shardckpt.PerRank(torch.ones(3, dtype=torch.int32))},
        {"c": shardckpt.PerRank(torch.ones(3, dtype=torch.int32))},
        {"c": torch.ones(3), "d": torch.zeros(3)},
        {"c": (tied := torch.ones(3)), "d": tied},
        {"c": torch.ones(3), "d": torch.zeros(3)},
        {"c": torch.ones(1, 3), "d": torch.zeros(3)},
    ]
    with shardckpt.Checkpointer(root) as ckpt:
        for step, state in enumerate(states):
            ckpt.save(step, state, wait=True)
    for step, state in enumerate(states):
        plain = {key: {0: value.value} if isinstance(value, shardckpt.PerRank) else value for key, value in state.items()}
        assert str(shardckpt.load(root / f"step-{step:08}").state) == str(plain)


def test_what_restore_is_told_is_passed_on(root: Path) -> None:
    with shardckpt.Checkpointer(root) as ckpt:
        digest = ckpt.save(1, a_state(1)).result().digest
        target: dict[str, Any] = {"t": torch.zeros(3, dtype=torch.float64), "new": 5, "step": 0}
        with pytest.raises(MissingNames):
            ckpt.restore(target, convert_dtype=True)
        restored = ckpt.restore(target, strict=False, convert_dtype=True, keys=["t", "new"], expect_digest=digest)
        assert restored is not None
        assert restored.info.missing == ("new",)
        assert target["t"].tolist() == [1.0] * 3
        assert target["step"] == 0
        with pytest.raises(shardckpt.DigestRefused):
            ckpt.restore(target, expect_digest="0" * 64)


# ---- wrong places


def test_a_root_that_holds_something_else(root: Path) -> None:
    root.mkdir()
    (root / "thesis.tex").write_text("all of it")
    with shardckpt.Checkpointer(root) as ckpt:
        assert ckpt.restore(a_state(0)) is None
        with pytest.raises(
            NotACheckpointRoot, match=r"holds 'thesis\.tex', which is no step\. Use a new or an empty directory"
        ):
            ckpt.save(1, a_state(1), wait=True)
    assert [path.name for path in root.iterdir()] == ["thesis.tex"]


def test_a_checkpoint_is_no_root(root: Path) -> None:
    shardckpt.save(root / "alone", a_state(1))
    with shardckpt.Checkpointer(root / "run") as ckpt:
        ckpt.save(1, a_state(1), wait=True)
    for place in (root / "alone", root / "run" / "step-00000001"):
        with shardckpt.Checkpointer(place) as ckpt:
            for call in (lambda: ckpt.restore(a_state(0)), lambda: ckpt.save(2, a_state(2), wait=True)):
                with pytest.raises(NotACheckpointRoot, match="is itself a checkpoint, and no root"):
                    call()


def test_a_root_that_is_a_file(root: Path) -> None:
    root.write_text("a file")
    with shardckpt.Checkpointer(root) as ckpt:
        with pytest.raises(NotACheckpointRoot):
            ckpt.restore(a_state(0))
        with pytest.raises(NotACheckpointRoot):
            ckpt.save(1, a_state(1), wait=True)
    assert root.read_text() == "a file"


def test_retention_on_ranks(ranks: RankPool, root: Path) -> None:
    for steps in ranks.run(2, keep_two, str(root)):
        assert steps == [[0], [0, 1], [1, 2], [2, 3]]


def interleave(first: str, second: str) -> tuple[int, int]:
    with shardckpt.Checkpointer(first) as latest, shardckpt.Checkpointer(second, keep_last=1) as best:
        for step in range(4):
            latest.save(step, a_state(step), wait=True)
            if step % 2:
                best.save(step, a_state(-step), wait=True)
        states = a_state(9), a_state(9)
        best.restore(states[1])
        latest.restore(states[0])
    return states[0]["step"], states[1]["step"]


def test_two_checkpointers_at_once_on_ranks(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, interleave, str(tmp_path / "a"), str(tmp_path / "b")) == [(3, -3)] * 2


def keep_two(root: str) -> list[list[int]]:
    found = []
    with shardckpt.Checkpointer(root, keep_last=2) as ckpt:
        for step in range(4):
            ckpt.save(step, a_state(step), wait=True)
            dist.barrier()
            found.append(ckpt.steps())
            dist.barrier()
    return found
