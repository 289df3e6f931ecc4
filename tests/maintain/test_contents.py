# SPDX-License-Identifier: Apache-2.0
"""What listings say of checkpoints and of roots."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

import shardckpt
from shardckpt.errors import CheckpointNotFound
from shardckpt.layout import PerRankShapes
from shardckpt.maintain.contents import Item, Spread, describe_spread, list_items, ranks_text
from shardckpt.maintain.listing import list_steps
from shardckpt.manifest import MANIFEST_NAME
from shardckpt.plan import Plan
from shardckpt.store import open_store
from tests.engine.strategies import plans
from tests.maintain.make import opened, rank_file, save_plain


def items(path: Path, *patterns: str) -> dict[str, Item]:
    return {item.name: item for item in list_items(opened(path), patterns or None)}


def test_every_name_is_described(everywhere: dict[str, Path]) -> None:
    plain, grid = items(everywhere["plain"]), items(everywhere["grid"])
    assert plain.keys() == grid.keys() == set(items(everywhere["flat"]))
    assert grid["matrix"] == Item(
        name="matrix",
        kind="tensor",
        dtype="float32",
        shape=(37, 11),
        bytes=37 * 11 * 4,
        layout=Spread("S(1), S(0)", (2, 2), "0-3", "0-3"),
    )
    assert grid["flags"].layout == Spread("R, S(0)", (2, 2), "0-3", "0-1")
    assert items(everywhere["flat"])["matrix"].layout == Spread("flat", None, "0-1", "0-1")
    assert items(everywhere["flat"])["scalar"].layout == Spread("flat", None, "0-1", "1")
    assert grid["tokens"] == Item(name="tokens", kind="value")
    assert grid["model/head.weight"].alias_of == "model/embed.weight"
    assert grid["model/head.weight"].bytes == 0
    assert grid["empty"].layout is not None
    assert grid["empty"].layout.writers == "none"


def test_what_ranks_have_for_themselves_is_described(everywhere: dict[str, Path]) -> None:
    found = items(everywhere["grid"], "rng/*")
    layout = Spread("per rank", None, "0-3", "0-3")
    assert found == {
        "rng/seed": Item(name="rng/seed", kind="per-rank value", bytes=4, layout=layout),
        # of lengths 3 to 6
        "rng/state": Item(name="rng/state", kind="per-rank tensor", dtype="int64", bytes=18 * 8, layout=layout),
    }
    assert items(everywhere["plain"], "rng/state")["rng/state"].shape == (3,)


def test_patterns_choose(everywhere: dict[str, Path]) -> None:
    assert sorted(items(everywhere["rows"], "mo*", "tokens")) == ["model/embed.weight", "model/head.weight", "tokens"]


@settings(max_examples=60)
@given(plans())
def test_writers_are_those_whose_files_hold_it(plan: Plan) -> None:
    for tensor in plan.tensors:
        held = [rank for rank in range(plan.world_size) if (piece := tensor.stored(rank)) is not None and piece.numel]
        described = describe_spread(tensor, plan.world_size)
        if not isinstance(tensor.layout, PerRankShapes):
            assert described.writers == ranks_text(held)


def test_ranks_in_few_characters() -> None:
    assert ranks_text([]) == "none"
    assert ranks_text([3]) == "3"
    assert ranks_text([5, 0, 1, 2, 7, 8]) == "0-2,5,7-8"
    assert ranks_text(range(16384)) == "0-16383"
    assert ranks_text(range(0, 64, 2)) == "0,2,4,6,8,10,12,14,... (32 ranks)"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Steps 1 to 3, and 4 without a manifest."""
    with shardckpt.Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, {"x": torch.arange(step)}, wait=True)
    shutil.copytree(tmp_path / "step-00000003", tmp_path / "step-00000004")
    (tmp_path / "step-00000004" / MANIFEST_NAME).unlink()
    (tmp_path / "notes.txt").write_text("mine")
    return tmp_path


def test_steps_of_a_root(root: Path) -> None:
    found = list_steps(open_store(root))
    assert [(f.name, f.step, f.state, f.world_size, f.files) for f in found] == [
        ("step-00000001", 1, "committed", 1, 2),
        ("step-00000002", 2, "committed", 1, 2),
        ("step-00000003", 3, "committed", 1, 2),
        ("step-00000004", 4, "incomplete", None, 1),
    ]
    assert found[0].bytes == sum(file.stat().st_size for file in (root / "step-00000001").iterdir())
    assert found[0].created == opened(root / "step-00000001").checkpoint.manifest.created
    assert found[3].created is None
    assert found[3].modified == rank_file(root / "step-00000004").stat().st_mtime


def test_damage_that_a_listing_shows(root: Path) -> None:
    rank_file(root / "step-00000001").unlink()
    os.truncate(rank_file(root / "step-00000002"), 5)
    (root / "step-00000003" / MANIFEST_NAME).write_text("{}")
    found = list_steps(open_store(root))
    assert [f.state for f in found] == ["damaged", "damaged", "damaged", "incomplete"]
    assert [f.world_size for f in found] == [1, 1, None, None]
    assert "missing or not of full size" in (found[0].problem or "")
    assert "invalid manifest" in (found[2].problem or "")


def test_a_checkpoint_that_has_the_place_to_itself(tmp_path: Path) -> None:
    save_plain(tmp_path, step=12)
    (found,) = list_steps(open_store(tmp_path))
    assert (found.name, found.step, found.state) == (".", 12, "committed")


def test_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointNotFound):
            list_steps(open_store(path))
