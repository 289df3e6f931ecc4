# SPDX-License-Identifier: Apache-2.0
"""A step that turns out to be damaged: an older one is restored when the user asked for that, on all ranks alike."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import shardckpt
from shardckpt.buffer import CHUNK
from shardckpt.coordinate import Coordinator
from shardckpt.errors import (
    AlreadyCommitted,
    CheckpointError,
    ChecksumMismatch,
    ConfigError,
    IntegrityError,
    InvalidManifest,
    MissingFile,
    MissingNames,
    ShapeMismatch,
    TruncatedFile,
    UnsupportedVersion,
)
from shardckpt.failure import common, describe
from tests.corruption.make import ONE_READER, blocks_state, flip, holds, manifest_path, rank_file, save_steps, step_path
from tests.engine.simulate import resealed
from tests.ranks import RankPool

Damage = Callable[[Path], object]
MIDDLE = 4096 + 200_000
PATIENCE = 120.0

DAMAGES: dict[str, tuple[Damage, type[CheckpointError]]] = {
    "a bit of data": (lambda step: flip(rank_file(step), MIDDLE), ChecksumMismatch),
    "a bit of the header": (lambda step: flip(rank_file(step), 9), ChecksumMismatch),
    "a bit of the manifest": (lambda step: flip(manifest_path(step), 300), InvalidManifest),
    "a manifest cut short": (lambda step: manifest_path(step).write_bytes(b"{"), InvalidManifest),
    "a file cut short": (lambda step: rank_file(step).write_bytes(b"x"), TruncatedFile),
    "a file that is gone": (lambda step: rank_file(step).unlink(), MissingFile),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with steps 1, 2 and 3."""
    save_steps(tmp_path / "run", 1, 2, 3)
    return tmp_path / "run"


def restore(root: Path, state: dict[str, Any], **how: Any) -> shardckpt.Restored:
    """By a process that was just started."""
    with shardckpt.Checkpointer(root) as ckpt:
        restored = ckpt.restore(state, **how)
    assert restored is not None
    return restored


@pytest.mark.parametrize(("damage", "kind"), DAMAGES.values(), ids=DAMAGES)
def test_the_newest_intact_step_is_restored(
    root: Path, caplog: pytest.LogCaptureFixture, damage: Damage, kind: type[CheckpointError]
) -> None:
    damage(step_path(root, 3))
    state = blocks_state(0)
    with pytest.raises(kind):
        restore(root, state)
    # as before the restore that has just failed, which is remembered
    shutil.rmtree(root / ".restores")
    with caplog.at_level(logging.WARNING, "shardckpt"):
        restored = restore(root, state, fallback=True)
    assert restored.step == 2
    assert holds(state, 2)
    ((step, reason),) = restored.info.skipped
    assert step == 3
    assert reason.startswith(f"{kind.__name__}: ")
    assert "partly" not in reason
    assert f"step 3 of {root} is damaged, an older one is tried: {kind.__name__}" in caplog.text


def test_an_intact_step_is_restored_without_a_word(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = blocks_state(0)
    with caplog.at_level(logging.WARNING, "shardckpt"):
        restored = restore(root, state, fallback=True)
    assert (restored.step, restored.info.skipped) == (3, ())
    assert holds(state, 3)
    assert caplog.text == ""
    assert not (root / ".restores").exists()


def test_a_root_without_steps(tmp_path: Path) -> None:
    with shardckpt.Checkpointer(tmp_path) as ckpt:
        assert ckpt.restore(blocks_state(0), fallback=True) is None


def test_several_damaged_steps(root: Path) -> None:
    flip(rank_file(step_path(root, 3)), MIDDLE)
    flip(manifest_path(step_path(root, 2)), 50)
    state = blocks_state(0)
    restored = restore(root, state, fallback=True)
    assert restored.step == 1
    assert [step for step, _ in restored.info.skipped] == [3, 2]
    assert holds(state, 1)


def test_the_newest_error_names_all_that_were_tried(root: Path) -> None:
    flip(rank_file(step_path(root, 3)), MIDDLE)
    rank_file(step_path(root, 2)).unlink()
    flip(manifest_path(step_path(root, 1)), 50)
    with pytest.raises(ChecksumMismatch) as caught:
        restore(root, blocks_state(0), fallback=True)
    assert caught.value.tried == [3, 2, 1]
    assert caught.value.name.startswith("step-00000003/rank-00000-")
    for part in ("No older step is intact", "step 3 (ChecksumMismatch", "step 2 (MissingFile", "step 1 (InvalidManifest"):
        assert part in str(caught.value)


def test_fallback_starts_from_the_step_that_is_asked_for(root: Path) -> None:
    flip(rank_file(step_path(root, 2)), MIDDLE)
    state = blocks_state(0)
    restored = restore(root, state, step=2, fallback=True)
    assert restored.step == 1
    assert [step for step, _ in restored.info.skipped] == [2]
    assert holds(state, 1)


def test_a_target_that_does_not_fit_is_no_damage(root: Path) -> None:
    with pytest.raises(ShapeMismatch):
        restore(root, blocks_state(0) | {"last": torch.zeros(6).half()}, fallback=True)
    assert not (root / ".restores").exists()


def test_a_newer_format_is_no_damage(root: Path) -> None:
    manifest = manifest_path(step_path(root, 3))
    manifest.write_bytes(resealed(manifest.read_bytes().replace(b'"version":1', b'"version":2')))
    with pytest.raises(UnsupportedVersion):
        restore(root, blocks_state(0), fallback=True)
    assert not (root / ".restores").exists()


def test_one_manifest_that_is_expected_leaves_no_choice(root: Path) -> None:
    with pytest.raises(ConfigError, match="leave one of them out"):
        restore(root, blocks_state(0), fallback=True, expect_digest="0" * 64)


def test_what_an_older_step_cannot_fill_anew_is_not_left_mixed(root: Path) -> None:
    """Step 4 has one tensor more, which is filled before the damage shows."""
    large = torch.ones(CHUNK // 8, dtype=torch.float64)
    with shardckpt.Checkpointer(root, options=ONE_READER) as ckpt:
        ckpt.save(4, blocks_state(4) | {"aaa": large}, wait=True)
        last = rank_file(step_path(root, 4))
        flip(last, last.stat().st_size - 1)
        with pytest.raises(MissingNames, match="'aaa': filled in part from a newer step") as caught:
            ckpt.restore(blocks_state(0) | {"aaa": torch.zeros_like(large)}, fallback=True, strict=False)
        assert caught.value.missing == ["aaa"]
        # nothing is lost: a new target takes the older step
        fresh = blocks_state(0) | {"aaa": torch.zeros_like(large)}
        restored = ckpt.restore(fresh, fallback=True, strict=False)
        assert restored is not None
        assert (restored.step, restored.info.missing) == (3, ("aaa",))
        assert holds(fresh, 3)
        assert not fresh["aaa"].any()


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("damage", [damage for damage, _ in DAMAGES.values()], ids=DAMAGES)
def test_training_that_comes_to_a_damaged_step_saves_it_anew(root: Path, damage: Damage, wait: bool) -> None:
    damage(step_path(root, 3))
    for start in range(2):
        # the second start has it from the first one that the step is damaged
        with shardckpt.Checkpointer(root) as ckpt:
            restored = ckpt.restore(blocks_state(0), fallback=True)
            assert restored is not None
            assert restored.step == 2
            if start:
                ckpt.save(3, blocks_state(30), wait=wait).result(PATIENCE)
    state = blocks_state(0)
    assert restore(root, state, fallback=True).info.skipped == ()
    assert holds(state, 30)
    assert not (root / ".restores").exists() or not list((root / ".restores").iterdir())


def test_a_step_that_was_repaired_meanwhile_is_not_overwritten(root: Path) -> None:
    flip(rank_file(step_path(root, 3)), MIDDLE)
    with shardckpt.Checkpointer(root) as ckpt:
        assert ckpt.restore(blocks_state(0), fallback=True) is not None
        flip(rank_file(step_path(root, 3)), MIDDLE)
        assert restore(root, blocks_state(0), step=3).step == 3
        with pytest.raises(AlreadyCommitted):
            ckpt.save(3, blocks_state(30), wait=True)
    state = blocks_state(0)
    assert restore(root, state).step == 3
    assert holds(state, 3)


def test_a_damaged_step_stays_where_nobody_asked_for_a_fallback(root: Path) -> None:
    flip(rank_file(step_path(root, 3)), MIDDLE)
    with pytest.raises(ChecksumMismatch):
        restore(root, blocks_state(0))
    before = sorted(path.name for path in step_path(root, 3).iterdir())
    with shardckpt.Checkpointer(root) as ckpt:
        assert ckpt.restore(blocks_state(0), step=2) is not None
        with pytest.raises(AlreadyCommitted):
            ckpt.save(3, blocks_state(30), wait=True)
    assert sorted(path.name for path in step_path(root, 3).iterdir()) == before


# ---- on real ranks


def spread(fill: float) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        "w": distribute_tensor(torch.full((1001, 97), fill), mesh, [Shard(0)]),
        "v": distribute_tensor(torch.full((5, 64), fill + 0.5), mesh, [Shard(1)]),
        "step": int(fill),
    }


def save_spread(root: str, steps: list[int]) -> None:
    with shardckpt.Checkpointer(root) as ckpt:
        for step in steps:
            ckpt.save(step, spread(step), wait=True)


def restore_spread(root: str, fallback: bool, read_once: str) -> Any:
    """What this rank is told, and whether it holds the step."""
    options = shardckpt.Options(read_once=read_once)  # type: ignore[arg-type]
    with shardckpt.Checkpointer(root, options=options) as ckpt:
        state = spread(0)
        restored = ckpt.restore(state, fallback=fallback)
    assert restored is not None
    for name, added in (("w", 0.0), ("v", 0.5)):
        leaf = state[name]
        assert isinstance(leaf, DTensor)
        assert (leaf.to_local() == restored.step + added).all()
    return restored.step, state["step"], restored.info.skipped


def fail_in_a_round() -> Any:
    """This rank's own error, and the one that all ranks have in common."""
    rank = dist.get_rank()
    with Coordinator.connect(timeout=60.0) as coordinator:

        def produce() -> bytes:
            if rank == 1:
                raise MissingFile("the file is gone", name="x")
            if rank == 2:
                raise ValueError("something else")
            return b""

        try:
            coordinator.round("fail", produce)
        except (CheckpointError, ValueError) as error:
            return type(error), describe(common(error))
    return None


def test_ranks_with_errors_of_their_own_have_one_in_common(ranks: RankPool) -> None:
    outcomes = ranks.run(4, fail_in_a_round)
    assert [kind for kind, _ in outcomes] == [MissingFile, MissingFile, ValueError, MissingFile]
    assert [told for _, told in outcomes] == [outcomes[0][1]] * 4
    assert outcomes[0][1].kind == "MissingFile"


@pytest.mark.parametrize("read_once", ["never", "always"])
@pytest.mark.parametrize("rank", [0, 2])
def test_all_ranks_fall_back_alike(ranks: RankPool, tmp_path: Path, rank: int, read_once: str) -> None:
    """Only one of three ranks sees the damage."""
    ranks.run(3, save_spread, str(tmp_path), [1, 2])
    flip(rank_file(step_path(tmp_path, 2), rank), 4096 + 100)
    outcomes = ranks.run(3, restore_spread, str(tmp_path), True, read_once)
    assert outcomes == [outcomes[0]] * 3
    step, value, ((skipped, reason),) = outcomes[0]
    assert (step, value, skipped) == (1, 1, 2)
    assert f"step-00000002/rank-0000{rank}-" in reason
    assert ranks.run(2, restore_spread, str(tmp_path), True, read_once) == [outcomes[0]] * 2, "at once, and at another size"


def test_all_ranks_get_the_newest_error(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_spread, str(tmp_path), [1, 2])
    flip(rank_file(step_path(tmp_path, 2), 1), 4096)
    rank_file(step_path(tmp_path, 1), 0).unlink()
    for outcome in ranks.run_expecting_errors(2, restore_spread, str(tmp_path), True, "never"):
        assert isinstance(outcome, ChecksumMismatch)
        assert outcome.tried == [2, 1]
    for outcome in ranks.run_expecting_errors(2, restore_spread, str(tmp_path), True, "never"):
        assert type(outcome) is IntegrityError
        assert outcome.tried == [2, 1]
