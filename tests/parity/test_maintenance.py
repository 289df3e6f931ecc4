# SPDX-License-Identifier: Apache-2.0
"""What verify, show, ls and prune say of parity files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from shardckpt.failed_restores import FailedRestores
from shardckpt.failure import Failure
from shardckpt.root import Root
from shardckpt.store import LocalStore
from tests.cli.run import run
from tests.parity.jobs import cut, flip, lose, opened, parity_file, parity_of, rank_file, save
from tests.ranks import RankPool

Copy = Callable[[int], Path]


@pytest.mark.parametrize(
    ("damage", "without_data", "with_data"),
    [(lose, "MissingFile", "MissingFile"), (cut, "TruncatedFile", "TruncatedFile"), (flip, None, "ChecksumMismatch")],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_verify_finds_damaged_parity(
    copy: Copy, damage: Callable[[Path], None], without_data: str | None, with_data: str
) -> None:
    path = copy(2)
    assert run("verify", path, "--read-data").status == 0
    file = parity_file(path, 1, 0)
    damage(file)
    for arguments, kind in ([], without_data), (["--read-data"], with_data):
        done = run("verify", path, "--json", *arguments)
        problems = done.json["checkpoints"][0]["problems"]
        assert [(problem["kind"], problem["file"]) for problem in problems] == ([(kind, file.name)] if kind else [])
        assert done.status == (1 if kind else 0)


def test_verify_finds_a_damaged_record(copy: Copy) -> None:
    path = copy(2)
    record = next(path.glob("parity-*.json"))
    flip(record, 20)
    (problem,) = run("verify", path, "--json").json["checkpoints"][0]["problems"]
    assert (problem["kind"], problem["file"]) == ("InvalidParity", record.name)
    assert "parity      none that counts: invalid parity record" in run("show", path).out
    assert run("show", path, "--json").json["parity"] is None


def test_show_says_whether_there_is_a_parity(copy: Copy) -> None:
    path = copy(3)
    assert "4 files, 933 kB, for one lost file in each of 2 groups of up to 2 ranks" in run("show", path).out
    document = run("show", path, "--json").json["parity"]
    assert document["groups"] == [[0, 2], [1, 3]]
    assert document["files"] == [{"name": file.name, "size": file.size} for file in parity_of(path).files]
    lose(next(path.glob("parity-*.json")))
    assert "parity      none\n" in run("show", path).out


def test_a_step_goes_with_its_parity(copy: Copy, tmp_path: Path, ranks: RankPool) -> None:
    root = tmp_path / "root"
    root.mkdir()
    copy(2).rename(root / "step-00000001")
    ranks.run(2, save, str(root / "step-00000002"), None, 2)
    assert [len(files.entries) for files in Root(LocalStore(root)).scan()] == [10, 3]
    assert run("ls", root, "--json").json["steps"][0]["files"] == 10
    assert run("prune", root, "--keep-last", "1").status == 0
    assert sorted(path.name for path in root.iterdir() if path.name.startswith("step-")) == ["step-00000002"]


def test_a_repaired_step_is_no_longer_one_that_could_not_be_restored(copy: Copy, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    step = copy(2).rename(root / "step-00000000")
    failed = FailedRestores(LocalStore(root))
    failed.remember(0, opened(step).checkpoint.digest, Failure("MissingFile", "gone", {}))
    lose(rank_file(step, 0))
    assert run("repair", root, "--dry-run").status == 0
    assert [entry.step for entry in failed.entries()] == [0]
    assert run("repair", root).status == 0
    assert failed.entries() == []
