# SPDX-License-Identifier: Apache-2.0
"""``shardckpt bench restart``: what it makes of the ranks' marks, and all of it on a tiny state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shardckpt.bench import BenchmarkFailed
from shardckpt.bench.restart import OURS, THEIRS, Turn, judge_marks, summarize_restarts
from shardckpt.bench.restart_marks import SAVED, Mark
from shardckpt.cli.bench import app


def marks(*, steps: tuple[int, ...] = (SAVED + 1, SAVED + 1), kills: int = 1) -> list[Mark]:
    """Those of a job that was killed at second 100."""
    first = [Mark(0, "step", 1, 90.0), Mark(0, "step", 2, 99.0), *(Mark(0, "kill", 2, 100.0) for _ in range(kills))]
    joined = [Mark(1, "joined", 0, 104.0 + rank) for rank in range(len(steps))]
    restored = [Mark(1, "restored", SAVED, 107.0 - rank) for rank in range(len(steps))]
    return [*first, *joined, *restored, *(Mark(1, "step", step, 108.0) for step in steps)]


def test_the_slowest_rank_counts() -> None:
    assert judge_marks(marks(), 2, SAVED) == Turn(joined=5.0, restored=7.0, stepped=8.0)
    assert judge_marks(marks(steps=(1, 1)), 2, None) == Turn(joined=5.0, restored=None, stepped=8.0)


@pytest.mark.parametrize("wrong", [marks(kills=0), marks(steps=(2,)), marks(steps=(1, 2)), marks(steps=(1, 1))])
def test_jobs_that_do_not_go_on_where_they_were_are_no_result(wrong: list[Mark]) -> None:
    with pytest.raises(BenchmarkFailed, match=r"went on with steps \["):
        judge_marks(wrong, 2, SAVED)


def test_medians_are_of_all_turns() -> None:
    line = summarize_restarts(OURS, [Turn(1.0, 2.0, 3.0), Turn(2.0, 4.0, 9.0), Turn(3.0, 9.0, 10.0)])
    assert (line.joined_s, line.restored_s, line.median_s, line.seconds) == (2.0, 4.0, 9.0, (3.0, 9.0, 10.0))
    assert summarize_restarts(THEIRS, [Turn(1.0, None, 3.0)]).restored_s is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bench_restart(tmp_path: Path) -> None:
    command = ["restart", "--size", "20MB", "--rounds", "1", "--dir", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    ours, theirs = report["results"]
    assert (ours["who"], theirs["who"], len(ours["seconds"]), len(theirs["seconds"])) == (OURS, THEIRS, 1, 1)
    assert 0 < ours["joined_s"] <= ours["restored_s"] <= ours["median_s"]
    assert theirs["restored_s"] is None
    (bar,) = report["bars"]
    assert bar["found"] == pytest.approx(ours["median_s"] - theirs["median_s"])
    assert list(tmp_path.iterdir()) == []
