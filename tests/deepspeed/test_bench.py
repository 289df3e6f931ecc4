# SPDX-License-Identifier: Apache-2.0
"""``shardckpt bench deepspeed`` end to end on a tiny state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shardckpt.cli.bench import app
from tests.deepspeed.engines import needs_deepspeed

pytestmark = [needs_deepspeed, pytest.mark.slow, pytest.mark.timeout(900)]

WHO = ["shardckpt", "DeepSpeed"]


def test_bench_deepspeed(tmp_path: Path) -> None:
    """Both give back what was saved, bit for bit; DeepSpeed reads everything on each rank, and its conversion doubles it."""
    command = ["deepspeed", "--size", "24MB", "--ranks", "2", "--to-ranks", "2", "--rounds", "1", "--dir", str(tmp_path)]
    result = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["benchmark"], report["parameters"], report["ranks"], report["to_ranks"]) == ("deepspeed", 2_000_000, 2, 2)
    lines = {(line["what"], line["who"]): line for line in report["results"]}
    saves = [(f"save, stage {stage}", who) for stage in (1, 2, 3) for who in (*WHO, "DeepSpeed + fsync")]
    loads = [("load on 2", who) for who in WHO]
    assert list(lines) == [*saves, *loads, ("import", "shardckpt"), ("ds_to_universal", "DeepSpeed")]
    assert all(line["wrong"] == [] and len(line["seconds"]) == 1 for line in lines.values())
    # of so little, manifests are a larger part, and so is what Python reads to import a module
    assert 1 <= lines["load on 2", "shardckpt"]["times_ideal"] < 1.2
    assert lines["load on 2", "DeepSpeed"]["times_ideal"] > 2
    assert 0.9 < lines["import", "shardckpt"]["extra_disk"] < 1.05
    assert lines["ds_to_universal", "DeepSpeed"]["extra_disk"] > 1.5
    assert list(tmp_path.iterdir()) == []
