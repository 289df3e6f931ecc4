# SPDX-License-Identifier: Apache-2.0
"""Benchmarks end to end on tiny states: what they report, that a contestant that lies is found, that nothing is left."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from shardckpt import ConfigError
from shardckpt.bench import BenchmarkFailed, Progress, ReshardSpec, SaveSpec, measure_reshard, measure_save
from shardckpt.bench.contest import Contest, Job
from shardckpt.bench.contestants import Contestant, Engine
from shardckpt.bench.launch import OnProgress, run_ranks
from shardckpt.bench.workload import Workload
from shardckpt.cli.bench import app

CONTESTANTS = ["shardckpt", "dcp", "raw"]
MACHINE = {
    *("cores", "memory_bytes", "processor", "system", "folder", "file_system", "device", "o_direct"),
    *("python", "torch", "shardckpt"),
}
WORKLOAD = {"bytes", "ranks", "parameters", "tensors", "layers", "width", "vocabulary", "rounds"}
LINE = {
    *("case", "cache", "contestant", "seconds", "median_s", "min_s", "max_s", "gb_per_s", "times_dcp", "of_raw"),
    *("bytes_needed", "bytes_read", "read_amplification", "verified"),
}


def no_progress(progress: Progress) -> None:
    pass


@pytest.mark.slow
def test_save(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["save", "--size", "400KB", "--rounds", "1", "--json", "--dir", str(tmp_path)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report.keys() == {"benchmark", "machine", "workload", "results", "raw_ways", "cold_by"}
    assert report["machine"].keys() == MACHINE
    assert report["workload"].keys() == WORKLOAD
    assert report["machine"]["folder"] == str(tmp_path)
    assert [line["contestant"] for line in report["results"]] == CONTESTANTS
    assert [line["verified"] for line in report["results"]] == [True, True, False]
    for line in report["results"]:
        assert line.keys() == LINE
        assert len(line["seconds"]) == 1
        assert line["min_s"] == line["median_s"] == line["max_s"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_reshard_to_another_dimension_counts_what_is_read(tmp_path: Path) -> None:
    seen: list[Progress] = []
    spec = ReshardSpec(nbytes=400_000, ranks=2, rounds=1, to_ranks=(4,), dims=(1,), caches=("cold",))
    report = measure_reshard(spec, str(tmp_path), seen.append)
    assert report.raw_ways.keys() == {"cold_read_4_ranks"}
    assert [(line.cache, line.contestant) for line in report.results] == [("cold", who) for who in CONTESTANTS]
    assert report.cold_by
    for line in report.results:
        assert (line.case.from_ranks, line.case.to_ranks, line.case.dim, len(line.seconds)) == (2, 4, 1, 1)
        if line.contestant == "shardckpt":
            assert line.bytes_needed is not None and line.bytes_needed >= report.workload.bytes
            assert line.read_amplification is not None and line.read_amplification <= 1.05
        if line.contestant == "dcp":
            # every rank needs a part of every row
            assert line.read_amplification is not None and line.read_amplification > 3
    assert seen[-1].done == seen[-1].total
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_load_prints_a_table(tmp_path: Path) -> None:
    command = ["load", "--size", "400KB", "--rounds", "1", "--cache", "warm", "--dir", str(tmp_path)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row[3] for row in rows if "warm" in row[2:3]] == CONTESTANTS
    assert "saved by 2 ranks" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_plan() -> None:
    command = ["plan", "--ranks", "6", "--model", "llama-8b", "--rounds", "1", "--peer", "--peer-ranks", "2"]
    result = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report.keys() == {
        *("benchmark", "machine", "model", "parameters", "tensors", "ranks", "steps", "planning_s", "manifest_bytes"),
        *("reading_back_s", "loads", "bars", "peer"),
    }
    assert (report["ranks"], report["model"], report["tensors"]) == (6, "llama-8b", 291 * 4 + 3)
    assert {step["name"].partition(":")[0] for step in report["steps"]} >= {"planning", "one rank"}
    assert [load["ranks"] for load in report["loads"]] == [6, 3]
    assert all(load["bytes_read"] >= load["bytes_needed"] > 0 for load in report["loads"])
    assert report["peer"]["ranks"] == 2
    assert report["peer"]["metadata_bytes"] > report["manifest_bytes"] / 10


# ---- contestants that are not what they should be


class Forgetful(Engine):
    """Loads, and then forgets its part of one tensor on the last rank."""

    def load(self, number: int, *, warm: bool) -> None:
        super().load(number, warm=warm)
        if os.environ["RANK"] == "1":
            with torch.no_grad():
                next(iter(self._workload.model.norm.parameters())).fill_(7.0)


def forgetful(folder: str, workload: Workload) -> Sequence[Contestant]:
    os.makedirs(os.path.join(folder, "forgetful"), exist_ok=True)
    return [Forgetful(os.path.join(folder, "forgetful"), workload)]


def contest(report: OnProgress, job: Job) -> None:
    Contest(report, job, forgetful).time_saves()


@pytest.mark.slow
def test_one_wrong_tensor_ends_the_benchmark(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkFailed, match="shardckpt did not give back what was saved"):
        run_ranks(2, contest, Job(folder=str(tmp_path), nbytes=400_000), no_progress)


def fail_on_last_rank(report: OnProgress, how: str) -> None:
    if os.environ["RANK"] == "1":
        if how == "dies":
            os._exit(7)
        raise ValueError(how)
    report(Progress(0, 1, "waiting"))
    os.read(os.pipe()[0], 1)


@pytest.mark.parametrize(("how", "problem"), [("dies", "ended with exit code 7"), ("no luck", "ValueError: no luck")])
def test_ranks_that_fail_are_named_and_the_others_ended(how: str, problem: str) -> None:
    with pytest.raises(BenchmarkFailed, match=f"rank 1 of 2 failed: .*{problem}") as caught:
        run_ranks(2, fail_on_last_rank, how, no_progress)
    assert caught.value.details["rank"] == 1


@pytest.mark.parametrize(
    ("folder", "nbytes", "problem"),
    [("file", 400_000, "Not a directory"), ("missing", 400_000, "No such file"), (".", 10**16, "GB free")],
)
def test_folders_that_will_not_do(tmp_path: Path, folder: str, nbytes: int, problem: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=problem):
        measure_save(SaveSpec(nbytes=nbytes), str(tmp_path / folder))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
