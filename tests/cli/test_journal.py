# SPDX-License-Identifier: Apache-2.0
"""What ``ls`` and ``prune`` make of saves that are under way, were killed or have failed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from shardckpt.errors import StorageFull, StoreError
from shardckpt.journal import DIRECTORY, LOST_SECONDS, SILENT_SECONDS, Journal
from shardckpt.manifest import MANIFEST_NAME, step_directory
from shardckpt.store import LocalStore
from tests.cli.run import run
from tests.maintain.make import rank_file

A, B = "a" * 16, "b" * 16


def uncommitted(root: Path, step: int) -> None:
    """Files of a step that is not committed."""
    shutil.copytree(root / step_directory(3), root / step_directory(step))
    (root / step_directory(step) / MANIFEST_NAME).unlink()


def age(root: Path, step: int, seconds: float) -> None:
    """Let all that there is of an uncommitted step be older."""
    for path in [*(root / step_directory(step)).glob("*"), *(root / DIRECTORY).glob(f"{step_directory(step)}-*")]:
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))


def states(root: Path) -> dict[int, tuple[str, str | None]]:
    return {step["step"]: (step["state"], step["problem"]) for step in run("ls", root, "--json").json["steps"]}


@pytest.fixture
def journal(root: Path) -> Journal:
    return Journal(LocalStore(root))


# ---- ls


def test_saves_under_way_and_failed_ones_are_listed(root: Path, journal: Journal) -> None:
    uncommitted(root, 5)
    journal.requested(4, A)
    journal.staged(5, A)
    journal.failed(6, A, StorageFull("no space left\nfor \x1b[31m rank 1"))
    age(root, 6, 3 * 3600)
    done = run("ls", root)
    assert (done.status, done.err) == (0, "")
    _, *rows, problem = done.out.splitlines()
    assert [row.split()[:4] for row in rows[3:]] == [
        ["4", "requested", "?", "0"],
        ["5", "staged", "?", "1"],
        ["6", "failed", "?", "0"],
    ]
    assert rows[5].split()[4:] == ["0", "B", "3", "h", "step-00000006"]
    assert rows[4].split()[-1] == "step-00000005"
    assert problem == "step-00000006: StorageFull: no space left\\nfor \\x1b[31m rank 1"


def test_committed_and_damaged_steps_are_what_their_manifest_says(root: Path, journal: Journal) -> None:
    journal.staged(1, A)
    journal.failed(3, B, StoreError("no"))
    rank_file(root / step_directory(2)).unlink()
    journal.staged(2, A)
    found = states(root)
    assert found[1] == found[3] == ("committed", None)
    assert found[2][0] == "damaged"


@pytest.mark.parametrize("state", ["requested", "staged"])
def test_a_killed_save_is_incomplete(root: Path, journal: Journal, state: str) -> None:
    uncommitted(root, 4)
    getattr(journal, state)(4, A)
    assert states(root)[4] == (state, None)
    age(root, 4, LOST_SECONDS + 60)
    assert states(root)[4] == ("incomplete", f"its save was {state} and never finished")
    shutil.rmtree(root / step_directory(4))
    assert 4 not in states(root)


def test_a_failure_that_was_made_good_is_not_told_of(root: Path, journal: Journal) -> None:
    uncommitted(root, 2_000_000)
    for step in (2, 5, 2_000_000):
        journal.failed(step, A, StoreError("no"))
        age(root, step, 3600)
    os.rename(root / step_directory(3), root / step_directory(5_000_000))
    found = states(root)
    assert found[2_000_000] == ("incomplete", None)
    assert set(found) == {1, 2, 2_000_000, 5_000_000}


def test_the_latest_attempt_at_a_step_counts(root: Path, journal: Journal) -> None:
    journal.failed(4, A, StoreError("no"))
    age(root, 4, 10)
    journal.staged(4, B)
    assert states(root)[4] == ("staged", None)
    journal.failed(4, B, StoreError("never"))
    assert states(root)[4] == ("failed", "StoreError: never")


def test_a_marker_that_cannot_be_read_is_listed(root: Path, journal: Journal) -> None:
    (root / DIRECTORY).mkdir()
    (root / DIRECTORY / f"step-00000004-{A}.failed").write_text("?")
    done = run("ls", root)
    assert done.out.splitlines()[-1] == "step-00000004: its save failed; the journal does not tell why"


def test_a_first_save_under_way_is_listed(tmp_path: Path) -> None:
    Journal(LocalStore(tmp_path / "new")).requested(7, A)
    done = run("ls", tmp_path / "new")
    assert done.status == 0
    assert done.out.splitlines()[1].split()[:2] == ["7", "requested"]
    for command in ("show", "verify", "digest"):
        done = run(command, tmp_path / "new")
        assert (done.status, done.out) == (1, "")
        assert "there is no committed checkpoint" in done.err


# ---- prune


def test_prune_removes_markers_that_tell_nothing(root: Path, journal: Journal) -> None:
    journal.failed(2, A, StoreError("no"))
    age(root, 2, 3600)
    journal.failed(7, B, StoreError("no"))
    for step in (4, 5, 6):
        getattr(journal, "staged" if step < 6 else "requested")(step, A)
    age(root, 4, SILENT_SECONDS + 60)
    age(root, 5, LOST_SECONDS + 60)
    before = sorted(path.name for path in (root / DIRECTORY).iterdir())

    dry = run("prune", root, "--keep-last", "2", "--dry-run")
    assert sorted(path.name for path in (root / DIRECTORY).iterdir()) == before
    lines = dry.out.splitlines()
    assert sorted(lines[1:-1]) == [
        "step 2: marker of a save that failed",
        "step 4: marker of a save that was staged and never finished",
        "step 5: marker of a save that was staged and never finished",
    ]
    planned = run("prune", root, "--keep-last", "2", "--dry-run", "--json").json
    done = run("prune", root, "--keep-last", "2", "--json").json
    assert done == {**planned, "dry_run": False}
    assert sorted((marker["step"], marker["attempt"], marker["state"]) for marker in done["markers"]) == [
        *((2, A, "failed"), (4, A, "staged"), (5, A, "staged"))
    ]
    left = sorted(path.name for path in (root / DIRECTORY).iterdir())
    assert left == [f"step-00000006-{A}.requested", f"step-00000007-{B}.failed"]
    assert run("prune", root, "--keep-last", "2", "--json").json["markers"] == []


def test_prune_by_age_takes_files_and_markers(root: Path, journal: Journal) -> None:
    for step in (4, 5):
        uncommitted(root, step)
        journal.staged(step, A)
    journal.failed(6, A, StoreError("no"))
    age(root, 4, 7200)
    age(root, 6, 7200)
    done = run("prune", root, "--keep-last", "9", "--incomplete-older-than", "1", "--json").json
    assert [removed["step"] for removed in done["removed"]] == [4]
    assert sorted(marker["step"] for marker in done["markers"]) == [4, 6]
    assert states(root).keys() == {1, 2, 3, 5}
    assert [path.name for path in (root / DIRECTORY).iterdir()] == [f"step-00000005-{A}.staged"]


def test_prune_of_markers_only(tmp_path: Path) -> None:
    Journal(LocalStore(tmp_path)).requested(7, A)
    done = run("prune", tmp_path, "--keep-last", "1")
    assert (done.status, done.out) == (0, "0 steps removed, 0 B; kept: none\n")
    age(tmp_path, 7, LOST_SECONDS + 60)
    done = run("prune", tmp_path, "--keep-last", "1")
    assert done.out.splitlines()[0] == "step 7: marker of a save that was requested and never finished"
    assert list(tmp_path.iterdir()) == []
    assert run("prune", tmp_path, "--keep-last", "1").status == 1
