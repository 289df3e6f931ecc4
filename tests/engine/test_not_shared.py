# SPDX-License-Identifier: Apache-2.0
"""Hosts with a disk each where they should share one: found before anything is called committed, and named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt import NotShared, Options
from tests.ranks import RankPool

WORLD_SIZE = 3
OPTIONS = Options(timeout=120)


def place_of(root: str) -> Path:
    """Where a rank finds what it takes for the root: ranks 0 and 1 share a host."""
    return Path(f"{root}-{'one' if dist.get_rank() < 2 else 'two'}")


def a_state(value: float) -> dict[str, object]:
    return {"w": torch.full((5,), value), "own": shardckpt.PerRank(dist.get_rank())}


def error_of(handle: shardckpt.SaveHandle) -> NotShared:
    with pytest.raises(NotShared) as caught:
        handle.result(120)
    return caught.value


def save_apart(root: str) -> list[NotShared]:
    """A blocking save, one in the background, and what the call after that raises, though errors of storage are tolerated."""
    found = []
    with shardckpt.Checkpointer(place_of(root), options=OPTIONS) as ckpt:
        with pytest.raises(NotShared) as caught:
            ckpt.save(1, a_state(1.0), wait=True)
        found.append(caught.value)
        found.append(error_of(ckpt.save(2, a_state(2.0))))
        ckpt.save(3, a_state(3.0))
        ckpt.wait()
        with pytest.raises(NotShared) as caught:
            ckpt.save(4, a_state(4.0))
        found.append(caught.value)
    return found


def files(root: Path) -> list[str]:
    return [path.name for path in root.rglob("*") if path.is_file() and not path.parent.name.startswith(".")]


def test_no_save_is_committed(ranks: RankPool, tmp_path: Path) -> None:
    root = tmp_path / "run"
    for errors in ranks.run(WORLD_SIZE, save_apart, str(root), timeout=250):
        assert len(errors) == 3
        for error in errors:
            assert error.ranks == [2]
            assert "rank 0 does not see the files that rank 2 (" in error.message
            assert "Save to a file system that all ranks share" in error.message
    assert [files(Path(f"{root}-{host}")) for host in ("one", "two")] == [[], []]


def save_together(root: str) -> None:
    with shardckpt.Checkpointer(root, options=OPTIONS) as ckpt:
        ckpt.save(1, a_state(1.0), wait=True)


def load_apart(root: str, fallback: bool) -> tuple[NotShared, object]:
    """The error, and what became of the target."""
    state = a_state(0.0)
    with shardckpt.Checkpointer(place_of(root), options=OPTIONS) as ckpt, pytest.raises(NotShared) as caught:
        ckpt.restore(state, fallback=fallback)
    return caught.value, state["w"]


def load_all(root: str) -> int:
    with shardckpt.Checkpointer(place_of(root), options=OPTIONS) as ckpt:
        restored = ckpt.restore(a_state(0.0), fallback=True)
        return restored.step if restored is not None else 0


def test_no_load_goes_wrong(ranks: RankPool, tmp_path: Path) -> None:
    """The step is not taken for damaged, and where each host has a copy, it can be loaded."""
    root = tmp_path / "run"
    ranks.run(WORLD_SIZE, save_together, str(root))
    shutil.copytree(root, f"{root}-one")
    Path(f"{root}-two").mkdir()
    for fallback in (False, True):
        for error, tensor in ranks.run(WORLD_SIZE, load_apart, str(root), fallback, timeout=250):
            assert error.ranks == [2]
            assert "is not there for rank 2 (" in error.message
            assert "the directory is not shared" in error.message
            assert isinstance(tensor, torch.Tensor)
            assert tensor.tolist() == [0.0] * 5
    shutil.rmtree(f"{root}-two")
    shutil.copytree(root, f"{root}-two")
    assert ranks.run(WORLD_SIZE, load_all, str(root), timeout=250) == [1] * WORLD_SIZE


def begin_anew_apart(root: str) -> tuple[list[int], str]:
    """Rank 0 sees an empty directory, where rank 2 sees a step."""
    with shardckpt.Checkpointer(place_of(root), options=OPTIONS) as ckpt, pytest.raises(NotShared) as caught:
        ckpt.restore(a_state(0.0))
    return caught.value.ranks, caught.value.message


def begin_anew(root: str) -> bool:
    with shardckpt.Checkpointer(root, options=OPTIONS) as ckpt:
        return ckpt.restore(a_state(0.0)) is None


def test_no_job_begins_anew_where_others_see_what_it_was_to_go_on_from(ranks: RankPool, tmp_path: Path) -> None:
    root = tmp_path / "run"
    ranks.run(WORLD_SIZE, save_together, f"{root}-two")
    for named, message in ranks.run(WORLD_SIZE, begin_anew_apart, str(root)):
        assert named == [2]
        assert "run-one is empty for rank 0 (" in message
        assert "and holds step 1 for rank 2 (" in message
    assert ranks.run(WORLD_SIZE, begin_anew, f"{root}-three") == [True] * WORLD_SIZE
