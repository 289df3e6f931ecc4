# SPDX-License-Identifier: Apache-2.0
"""``shardckpt show --timings``: phases and ranks, for a few ranks and for many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import pytest

from shardckpt.events import Phase
from shardckpt.layout import Mesh, MeshLayout, Shard
from shardckpt.maintain.stored import open_checkpoint
from shardckpt.maintain.timings import laggards, list_timings
from shardckpt.manifest import MANIFEST_NAME, encode_manifest
from shardckpt.metrics import encode_columns
from shardckpt.store import LocalStore
from tests.cli.run import run
from tests.engine.simulate import by_hand, save

Seconds = Mapping[Phase, float]
ROWS = 1000


def saved(path: Path, seconds: Sequence[Seconds]) -> LocalStore:
    """A checkpoint of ranks with 4000 bytes each, whose manifest says that its save took as long as that."""
    world_size = len(seconds)
    layout = MeshLayout((ROWS * world_size,), Mesh(tuple(range(world_size)), (world_size,)), (Shard(0),))
    store = LocalStore(path)
    manifest = save(store, by_hand(world_size, {"x": ("float32", layout, (0, 1))})).checkpoint.manifest
    told = msgspec.structs.replace(manifest, metrics=encode_columns(seconds))
    (path / MANIFEST_NAME).write_bytes(encode_manifest(told))
    return store


def tables(path: Path) -> list[list[list[str]]]:
    """The words of each line of what is printed, by paragraph."""
    done = run("show", path, "--timings")
    assert done.status == 0
    return [[line.split() for line in part.splitlines()] for part in done.out.split("\n\n")[1:]]


FEW: list[Seconds] = [
    {"plan": 0.001, "write": 0.004, "receipts": 2.5},
    {"plan": 0.001, "write": 0.016},
    {"plan": 0.003, "write": 0.008},
]


def test_phases_and_ranks(tmp_path: Path) -> None:
    saved(tmp_path, FEW)
    phases, ranks = tables(tmp_path)
    assert phases == [
        ["phase", "min", "s", "median", "s", "max", "s", "slowest", "rank", "its", "GB/s", "median", "GB/s"],
        ["plan", "0.001", "0.001", "0.003", "2"],
        ["write", "0.004", "0.008", "0.016", "1", "0.00", "0.00"],
        ["receipts", "2.500", "2.500", "2.500", "0"],
    ]
    assert ranks[1:] == [
        ["rank", "plan", "write"],
        ["0", "0.001", "0.004"],
        ["1", "0.001", "*", "0.016"],
        ["2", "*", "0.003", "0.008"],
    ]


def test_one_rank_needs_no_table_of_ranks(tmp_path: Path) -> None:
    saved(tmp_path, FEW[:1])
    (phases,) = tables(tmp_path)
    assert [row[0] for row in phases] == ["phase", "plan", "write", "receipts"]


def test_of_many_ranks_the_worst_are_listed(tmp_path: Path) -> None:
    seconds: list[dict[Phase, float]] = [{"hash": 1.0, "write": 5.0 + rank / 1000} for rank in range(40)]
    seconds[33]["write"] = 15.0
    seconds[7]["hash"] = 9.0
    saved(tmp_path, seconds)
    phases, ranks = tables(tmp_path)
    assert phases[1:] == [
        ["hash", "1.000", "1.000", "9.000", "7", "0.00", "0.00"],
        ["write", "5.000", "5.019", "15.000", "33", "0.00", "0.00"],
    ]
    assert " ".join(ranks[0]) == (
        "Seconds of the 8 ranks of 40 that were most behind the median; * marks the slowest rank of all:"
    )
    assert ranks[2:5] == [["33", "1.000", "*", "15.000"], ["7", "*", "9.000", "5.007"], ["39", "1.000", "5.039"]]
    assert len(ranks) == 10


def test_timings_as_json(tmp_path: Path) -> None:
    saved(tmp_path, FEW)
    assert run("show", tmp_path, "--timings", "--json").json["timings"] == [
        {"phase": "plan", "seconds": [0.001, 0.001, 0.003], "bytes": None, "slowest": 2},
        {"phase": "write", "seconds": [0.004, 0.016, 0.008], "bytes": [4000, 4000, 4000], "slowest": 1},
        {"phase": "receipts", "seconds": [2.5], "bytes": None, "slowest": 0},
    ]
    assert "timings" not in run("show", tmp_path, "--json").json


def test_a_checkpoint_without_timings_says_so(tmp_path: Path) -> None:
    saved(tmp_path, [{}, {}])
    ((words,),) = tables(tmp_path)
    assert " ".join(words).startswith("No timings: shardckpt ")
    assert run("show", tmp_path, "--timings", "--json").json["timings"] == []


def test_only_rank_0_told_anything(tmp_path: Path) -> None:
    saved(tmp_path, [{"receipts": 1.0}, {}])
    (phases,) = tables(tmp_path)
    assert phases[1:] == [["receipts", "1.000", "1.000", "1.000", "0"]]


def test_speed(tmp_path: Path) -> None:
    seconds: list[Seconds] = [{"write": 2e-6, "fsync": 1.0}, {"write": 0.0, "fsync": 1.0}]
    write, fsync = list_timings(open_checkpoint(saved(tmp_path, seconds)))
    assert write.speed(0) == pytest.approx(2.0)
    assert write.speed(1) is None
    assert fsync.speed(0) is None


def test_ranks_that_are_equally_slow_come_in_order(tmp_path: Path) -> None:
    seconds: list[Seconds] = [{"write": 1.0}] * 20
    assert laggards(list_timings(open_checkpoint(saved(tmp_path, seconds))), 3) == [0, 1, 2]
