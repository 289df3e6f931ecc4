# SPDX-License-Identifier: Apache-2.0
"""The newest checkpoint of a root, by which its room is judged: whole, damaged, unreadable, or none of a root at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import shardckpt
from shardckpt.doctor import Finding
from shardckpt.doctor.finding import amount
from shardckpt.doctor.newest import find_newest
from shardckpt.errors import NotACheckpointRoot
from shardckpt.root import Root
from shardckpt.store import LocalStore
from tests.doctor.test_storage import MIB, look, machine, saved
from tests.maintain.make import flip


def newest(root: Path) -> Finding:
    return look(machine(root))["newest checkpoint"]


def test_files_of_other_attempts_are_not_counted(tmp_path: Path) -> None:
    root = saved(tmp_path / "run")
    before = find_newest(LocalStore(root))
    (root / "step-00000003" / "rank-00000-0123456789abcdef.safetensors").write_bytes(bytes(MIB))
    assert find_newest(LocalStore(root)) == before


@pytest.mark.parametrize("place", ["one", "run/step-00000003"])
def test_a_checkpoint_is_no_root(tmp_path: Path, place: str) -> None:
    shardckpt.save(tmp_path / "one", {"own": torch.zeros(10)})
    saved(tmp_path / "run")
    found = newest(tmp_path / place)
    with pytest.raises(NotACheckpointRoot) as refused:
        Root(LocalStore(tmp_path / place)).require_no_checkpoint()
    assert found.status == "problem"
    assert f"{found.text}. {found.remedy}" == refused.value.message
    assert found.remedy.startswith("Name the directory above")


def test_a_root_of_other_things(tmp_path: Path) -> None:
    """One of them has the name of a save's, so that all are listed."""
    (tmp_path / "probe.01234567.tmp").touch()
    (tmp_path / "thesis.tex").write_text("mine")
    found = newest(tmp_path)
    assert found.status == "problem"
    assert found.remedy.lower() == "use a new or an empty directory"


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_files_that_are_missing_or_cut_are_counted_all_the_same(tmp_path: Path, damage: str) -> None:
    root = saved(tmp_path / "run", 2 * MIB)
    before = newest(root).values
    [file] = (root / "step-00000003").glob("rank-*")
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(bytes(100))
    found = newest(root)
    assert found.status == "warning"
    assert found.text == f"step 3: {amount(before['bytes'])} by 1 rank; {file.name} is missing, or of another size"
    assert f"shardckpt verify {root}/step-00000003" in found.remedy
    assert found.values == {**before, "damaged": [file.name]}


def test_a_manifest_that_cannot_be_read_is_a_problem_and_the_rest_is_looked_at(tmp_path: Path) -> None:
    root = saved(tmp_path / "run")
    flip(root / "step-00000003" / "manifest.json", 100)
    found = look(machine(root))
    told = found["newest checkpoint"]
    assert (told.status, told.values) == ("problem", {"error": "InvalidManifest"})
    assert told.text.startswith(f"step 3 ({root}/step-00000003): invalid manifest: ")
    assert f"shardckpt verify {root}/step-00000003" in told.remedy
    assert found["free space"].status == found["write speed"].status == "ok"


def test_an_older_step_stands_for_one_that_cannot_be_read(tmp_path: Path) -> None:
    root = saved(tmp_path / "run")
    whole, _ = find_newest(LocalStore(root))
    with shardckpt.Checkpointer(root) as ckpt:
        ckpt.save(4, {"own": torch.zeros(5 * MIB, dtype=torch.uint8)}, wait=True)
    flip(root / "step-00000004" / "manifest.json", 100)
    found, findings = find_newest(LocalStore(root))
    assert found == whole
    assert [(finding.status, finding.text[:6]) for finding in findings] == [("problem", "step 4"), ("ok", "step 3")]
