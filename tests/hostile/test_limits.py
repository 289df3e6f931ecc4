# SPDX-License-Identifier: Apache-2.0
"""What a hostile checkpoint may cost before it is refused: in processes of little memory and time, and no allocation on a
manifest's word.

The bounds are generous: what they catch takes gigabytes or minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shardckpt
from shardckpt.errors import InvalidManifest
from shardckpt.manifest import MANIFEST_LIMIT, MANIFEST_NAME, rank_file_name
from shardckpt.validate import parse_manifest
from tests.hostile.base import ATTEMPT, examine
from tests.hostile.cases import CASES
from tests.hostile.greedy import BLOCK, GREEDY, claims, tiny
from tests.style.source import ROOT

MOST_MEMORY = 192 << 20
MOST_SECONDS = 30.0
KIB = 1200

Outcome = tuple[str | None, float, int]


def look(kind: str, paths: list[Path]) -> dict[str, Outcome]:
    """By name, what a limited process says of each path."""
    command = [sys.executable, "-m", "tests.hostile.limited", kind, *map(str, paths)]
    # each thread would reserve address space for memory of its own
    environment = {**os.environ, "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT, env=environment)
    assert done.returncode == 0, f"exit status {done.returncode} (below 0: a signal, as for too much time)\n{done.stderr}"
    return {Path(path).name: tuple(outcome) for path, outcome in json.loads(done.stdout).items()}


def check(found: dict[str, Outcome], most_memory: int = MOST_MEMORY) -> None:
    for name, (_, seconds, grown) in found.items():
        assert seconds < MOST_SECONDS, name
        assert grown < most_memory, name
    worst = max(found, key=lambda name: found[name][1])
    largest = max(found, key=lambda name: found[name][2])
    print(
        f"{len(found)} looked at; at most {found[worst][1]:.2f} s of CPU ({worst}) "
        f"and {found[largest][2] / 1e6:.0f} MB of memory ({largest})"
    )


@pytest.mark.slow
def test_all_refusals_are_cheap(tmp_path: Path) -> None:
    for name, case in CASES.items():
        (tmp_path / name).write_bytes(case.make())
    found = look("examine", sorted(tmp_path.iterdir()))
    check(found)
    assert {name: error for name, (error, _, _) in found.items()} == {name: case.kind.__name__ for name, case in CASES.items()}


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_manifests_are_small(name: str) -> None:
    assert len(GREEDY[name]) <= KIB


@pytest.mark.slow
def test_a_kilobyte_cannot_ask_for_much(tmp_path: Path) -> None:
    for name, data in GREEDY.items():
        (tmp_path / name).write_bytes(data)
    found = look("examine", sorted(tmp_path.iterdir()))
    check(found)
    accepted = {name for name, (error, _, _) in found.items() if error is None}
    lists = {"list-of-millions", "many-lists-of-millions"}
    assert accepted == lists | {"shards-of-many-pieces", "shards-of-many-shards", "empty-tensors"}


def checkpoint(path: Path, manifest: bytes, size: int | None) -> Path:
    """A checkpoint of one file of ``size`` bytes, which take no space; of none, if that is None."""
    path.mkdir()
    (path / MANIFEST_NAME).write_bytes(manifest)
    if size is not None:
        with open(path / rank_file_name(0, ATTEMPT), "wb") as file:
            file.truncate(size)
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "good"
    shardckpt.save(path, {"big": torch.zeros(3), "value": shardckpt.PerRank(1)})
    return path


HUGE = 56 * BLOCK
"""More than a limited process can allocate."""


@pytest.mark.slow
def test_no_memory_is_taken_before_files_are_seen_to_have_it(tmp_path: Path, good: Path) -> None:
    value = tiny({"v": {"dtype": "uint8", "per_rank": [[HUGE]], "value": True}}, data=HUGE)
    paths = [
        checkpoint(tmp_path / "missing", claims(HUGE), None),
        checkpoint(tmp_path / "empty", claims(HUGE), 0),
        checkpoint(tmp_path / "short", claims(HUGE), 4096 + HUGE - 1),
        checkpoint(tmp_path / "long", claims(HUGE), 4096 + HUGE + 1),
        checkpoint(tmp_path / "header", claims(3, header=99_999_744), 4099),
        checkpoint(tmp_path / "value", value, 4096 + HUGE),
        checkpoint(tmp_path / "zeros", claims(BLOCK), 4096 + BLOCK),
    ]
    # of a manifest over its cap nothing is read
    over = checkpoint(tmp_path / "over", b"", None)
    os.truncate(over / MANIFEST_NAME, MANIFEST_LIMIT + 1)
    assert max(len((path / MANIFEST_NAME).read_bytes()) for path in paths) < KIB
    found = look("load", [good, *paths, over])
    check(found)
    assert {name: error for name, (error, _, _) in found.items()} == {
        "missing": "MissingFile",
        "empty": "TruncatedFile",
        "short": "TruncatedFile",
        "long": "TruncatedFile",
        "header": "TruncatedFile",
        "value": "InvalidManifest",
        "zeros": "ChecksumMismatch",
        "over": "StoreError",
    }


@pytest.mark.slow
def test_no_memory_is_taken_before_the_target_is_seen_to_fit(tmp_path: Path, good: Path) -> None:
    paths = [
        checkpoint(tmp_path / "there", claims(HUGE), 4096 + HUGE),
        checkpoint(tmp_path / "missing", claims(HUGE), None),
    ]
    found = look("fill", [good, *paths])
    check(found)
    assert {name: error for name, (error, _, _) in found.items()} == {"there": "ShapeMismatch", "missing": "MissingFile"}


def test_no_manifest_over_its_cap_is_written() -> None:
    """What no load would read must not be committed: the same check is before both."""
    with pytest.raises(InvalidManifest, match="size: 268435457 bytes, more than the 268435456"):
        parse_manifest(bytes(MANIFEST_LIMIT + 1))


def test_the_good_ones_are_good() -> None:
    assert examine(claims(3)).plan.total_bytes == 3
