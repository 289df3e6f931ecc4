# SPDX-License-Identifier: Apache-2.0
"""An error that comes when a part of the target is filled: it names what is not what it was, and says what that means."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardckpt
from shardckpt.buffer import CHUNK
from shardckpt.errors import CheckpointError, ChecksumMismatch, RankFailed
from tests.corruption.make import ONE_READER, flip, rank_file
from tests.ranks import RankPool

ROWS = CHUNK // 8


def tensors(fill: float) -> dict[str, Any]:
    """A chunk each, in this order."""
    return {name: torch.full((ROWS,), fill, dtype=torch.float64) for name in ("a", "b", "c")}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of three chunks."""
    shardckpt.save(tmp_path, tensors(1) | {"n": 1})
    return tmp_path


@pytest.mark.parametrize(("chunk", "filled"), [(0, []), (1, ["a"]), (2, ["a", "b"])])
def test_what_was_filled_is_named(saved: Path, chunk: int, filled: list[str]) -> None:
    flip(rank_file(saved), 4096 + chunk * CHUNK + 5)
    target = tensors(0) | {"n": 0}
    with pytest.raises(ChecksumMismatch) as caught:
        shardckpt.load(saved, target, options=ONE_READER)
    assert [name for name in ("a", "b", "c") if target[name].any()] == filled
    assert caught.value.details.get("partly_filled", []) == filled
    assert ("holds a mixture and must not be trained on" in str(caught.value)) == bool(filled)
    assert target["n"] == 0


def test_nothing_is_said_of_a_state_that_nobody_has(saved: Path) -> None:
    flip(rank_file(saved), 4096 + 2 * CHUNK)
    with pytest.raises(ChecksumMismatch) as caught:
        shardckpt.load(saved, options=ONE_READER)
    assert "partly_filled" not in caught.value.details


def test_a_part_of_a_tensor_is_enough(tmp_path: Path) -> None:
    shardckpt.save(tmp_path, {"model": {"w": torch.ones(3 * ROWS, dtype=torch.float64)}})
    flip(rank_file(tmp_path), 4096 + CHUNK)
    model = nn.Module()
    weight = torch.zeros(3 * ROWS, dtype=torch.float64)
    model.register_buffer("w", weight)
    with pytest.raises(ChecksumMismatch) as caught:
        shardckpt.load(tmp_path, {"model": model}, options=ONE_READER)
    assert caught.value.partly_filled == ["model/w"]
    assert weight.sum() == ROWS


def test_a_later_load_makes_it_whole(saved: Path) -> None:
    file = rank_file(saved)
    flip(file, 4096 + CHUNK)
    target = tensors(0) | {"n": 0}
    with pytest.raises(ChecksumMismatch):
        shardckpt.load(saved, target, options=ONE_READER)
    flip(file, 4096 + CHUNK)
    shardckpt.load(saved, target, options=ONE_READER)
    assert all(torch.equal(target[name], whole) for name, whole in tensors(1).items())
    assert target["n"] == 1


class Stubborn:
    """Something that does not take what it gave."""

    def state_dict(self) -> dict[str, Any]:
        return {"x": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise ValueError("not today")


def test_an_error_of_the_users_own_code(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is raised as it is, so what there is to say of the tensors stands in the log."""
    shardckpt.save(tmp_path, {"t": torch.ones(3), "odd": Stubborn()})
    with pytest.raises(ValueError, match="not today"), caplog.at_level(logging.ERROR, "shardckpt"):
        shardckpt.load(tmp_path, {"t": torch.zeros(3), "odd": Stubborn()})
    assert "'t' were filled before" in caplog.text
    assert "must not be trained on" in caplog.text


# ---- on real ranks


def save_parts(root: str) -> None:
    """Each rank has three chunks of its own."""
    shardckpt.save(root, {"own": shardckpt.PerRank(tensors(dist.get_rank() + 1.0))})


def load_parts(root: str) -> Any:
    """The error, and which tensors of this rank have changed."""
    target = tensors(0)
    try:
        shardckpt.load(root, {"own": shardckpt.PerRank(target)}, options=ONE_READER)
    except CheckpointError as error:
        return error, [f"own/{name}" for name, tensor in target.items() if tensor.any()]
    return None


def test_each_rank_names_its_own(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(3, save_parts, str(tmp_path))
    flip(rank_file(tmp_path, 1), 4096 + CHUNK)
    outcomes = ranks.run(3, load_parts, str(tmp_path))
    assert [changed for _, changed in outcomes] == [["own/a", "own/b", "own/c"], ["own/a"], ["own/a", "own/b", "own/c"]]
    for rank, (error, changed) in enumerate(outcomes):
        assert type(error) is ChecksumMismatch
        assert error.name == rank_file(tmp_path, 1).name
        assert error.partly_filled == changed
        assert f"On rank {rank} 'own/a'" in str(error)


def load_into_odd(root: str) -> Any:
    target = {"t": torch.zeros(3), "odd": Stubborn() if dist.get_rank() else {"x": 0}}
    try:
        shardckpt.load(root, target)
    except (CheckpointError, ValueError) as error:
        return type(error), getattr(error, "details", {}).get("partly_filled")
    return None


def test_a_rank_that_is_filled_when_another_one_fails(ranks: RankPool, tmp_path: Path) -> None:
    shardckpt.save(tmp_path, {"t": torch.ones(3), "odd": Stubborn()})
    assert ranks.run(2, load_into_odd, str(tmp_path)) == [(RankFailed, ["t"]), (ValueError, None)]
