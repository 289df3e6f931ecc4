# SPDX-License-Identifier: Apache-2.0
"""Saves and restores across hosts: whole, over bad cables, and with directories that hosts do not share."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt import NotShared, Options
from tests.nodes.cluster import PATIENCE, Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LONG = 300.0
"""Seconds that ranks wait for each other: never used up."""
KINDS: tuple[dict[str, Any], ...] = (
    {"background": "thread"},
    {"background": "thread", "stage": "lazy", "parity": "xor:2"},
    {"background": "process"},
)


def a_part(step: int) -> dict[str, Any]:
    """A state of which each rank has a part of its own, and all have one together."""
    return {"t": torch.full((1000,), float(step)), "own": shardckpt.PerRank(torch.full((1000,), 10 * step + dist.get_rank()))}


def save_and_restore(place: Path, kinds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Two saves and a restore of each kind; what this rank knows of hosts."""
    rank = dist.get_rank()
    hosts: dict[str, Any] = {}
    for number, kind in enumerate(kinds):
        root = place / f"root-{number}"
        with shardckpt.Checkpointer(root, options=Options(timeout=LONG, **kind)) as ckpt:
            hosts = {"hosts": ckpt._coordinator.hosts, "local": ckpt._coordinator.local_ranks}
            ckpt.save(1, a_part(1), wait=True)
            ckpt.save(2, a_part(2)).result(PATIENCE)
        with shardckpt.Checkpointer(root, options=Options(timeout=LONG)) as ckpt:
            state = a_part(0)
            restored = ckpt.restore(state)
            assert restored is not None
            assert restored.step == 2
            assert restored.info.read_once
            assert state["t"].tolist() == [2.0] * 1000
            assert state["own"].value.tolist() == [20 + rank] * 1000
            assert ckpt.steps() == [1, 2]
    return hosts


def test_all_kinds_of_saves_across_hosts(cluster: Cluster) -> None:
    found = cluster.run(save_and_restore, KINDS)
    assert [one["hosts"] for one in found] == [cluster.HOSTS] * 4
    assert [one["local"] for one in found] == [2, 2, 1, 1]


def test_bad_cables(cluster: Cluster) -> None:
    """50 ms from any host to any other, and 2 % of all frames lost."""
    with cluster.network.slow(range(3), seconds=0.025, loss=0.01):
        cluster.run(save_and_restore, KINDS[1:])


# ---- hosts with a disk each


def save_to_own_disks(place: Path, disk: Path) -> list[NotShared]:
    """What comes of saves to a directory that each host has for itself."""
    found = []
    for number, kind in enumerate((KINDS[0], KINDS[2])):
        with shardckpt.Checkpointer(disk / f"run-{number}", options=Options(timeout=LONG, **kind)) as ckpt:
            for step, wait in ((1, True), (2, False)):
                with pytest.raises(NotShared) as caught:
                    ckpt.save(step, a_part(step), wait=wait).result(PATIENCE)
                found.append(caught.value)
            assert ckpt.steps() == []
    return found


def restore_from_own_disk(place: Path, root: Path) -> NotShared:
    """What comes of a checkpoint that is on the disk of rank 0's host only."""
    state = a_part(0)
    with shardckpt.Checkpointer(root, options=Options(timeout=LONG)) as ckpt, pytest.raises(NotShared) as caught:
        ckpt.restore(state, fallback=True)
    assert state["t"].tolist() == [0.0] * 1000
    return caught.value


def save_one(place: Path, root: Path) -> None:
    with shardckpt.Checkpointer(root, options=Options(timeout=LONG)) as ckpt:
        ckpt.save(1, a_part(1), wait=True)


def test_disks_that_are_not_shared(cluster: Cluster) -> None:
    disk = cluster.directory / "disk"
    disk.mkdir()
    own = [cluster.directory / f"disk-of-node{number}" for number in range(3)]
    for number, directory in enumerate(own):
        directory.mkdir()
        cluster.network.mount(number, directory, disk)
    for errors in cluster.run(save_to_own_disks, disk):
        for error in errors:
            assert error.ranks == [2, 3]
            assert "rank 0 does not see the files that ranks 2 (node1), 3 (node2) wrote" in error.message
    for directory in own:
        assert not [file for file in directory.rglob("*.*") if file.is_file() and file.parent.name.startswith("step-")]

    cluster.run(save_one, cluster.directory / "shared")
    shutil.copytree(cluster.directory / "shared", own[0] / "shared")
    for error in cluster.run(restore_from_own_disk, disk / "shared"):
        assert error.ranks == [2, 3]
        assert "is there for rank 0, and is not there for ranks 2 (node1), 3 (node2)" in error.message
