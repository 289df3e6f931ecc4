# SPDX-License-Identifier: Apache-2.0
"""`bench async`: every contestant takes its turn and is checked; one that lies or fails is named, and the others go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from shardckpt import ConfigError, Options
from shardckpt.bench import AsyncSpec, Progress, measure_async
from shardckpt.bench.async_contest import AsyncContest, AsyncJob, AsyncOutcome
from shardckpt.bench.async_contestants import Engine, Entrant, Flight, Nobody, Saver
from shardckpt.bench.async_entrants import all_entrants, choose
from shardckpt.bench.launch import OnProgress, run_ranks
from shardckpt.bench.shapes import GPTShape
from shardckpt.bench.training import Training
from shardckpt.cli.bench import app
from tests.ranks import RankPool

pytest.importorskip("shardckpt.bench.async_peers", reason="DCP of this torch has no stagers", exc_type=ImportError)
SIZE = 400_000
ENGINES = [
    *("shardckpt-blocking", "shardckpt-eager-thread", "shardckpt-eager-process", "shardckpt-lazy-thread"),
    *("shardckpt-lazy-process", "shardckpt-none-thread"),
]
PEERS = [
    *("dcp-blocking", "dcp-thread", "dcp-thread-kept", "dcp-thread-lazy"),
    *("dcp-process", "dcp-process-kept", "dcp-process-lazy"),
]
LINE = {
    *("contestant", "how", "stalls", "stall_s", "stall_max_s", "call_s", "first_stall_s", "times_copy", "steps_per_s"),
    *("steps_per_s_in_flight", "loss", "lost_s", "durable_s", "times_blocking", "memory_bytes", "times_shard"),
    *("checked", "wrong", "problem"),
}


def no_progress(progress: Progress) -> None:
    pass


def spec_of(*contestants: str) -> AsyncSpec:
    return AsyncSpec(nbytes=SIZE, rounds=1, saves=1, steps=1, samples=1, contestants=contestants)


# ---- from end to end


@pytest.mark.slow
def test_the_engine_in_every_mode(tmp_path: Path) -> None:
    seen: list[Progress] = []
    report = measure_async(spec_of("no-checkpoints", "shardckpt-*"), str(tmp_path), seen.append)
    nobody, *lines = report.results
    assert [line.contestant for line in lines] == ENGINES
    assert (nobody.stalls, nobody.checked) == ((), 0)
    for line in lines:
        assert (line.wrong, line.problem, line.checked, len(line.stalls)) == ((), "", 2, 1), line
        assert line.durable_s is not None and line.stall_s is not None and line.durable_s >= line.stall_s > 0
        assert line.memory_bytes is not None
    assert report.shard_bytes < report.workload.bytes <= 2 * report.shard_bytes
    assert {bar.contestant for bar in report.bars} == {*ENGINES[1:]}
    assert seen[-1].done == seen[-1].total
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_dcp_by_threads(tmp_path: Path) -> None:
    command = ["async", "--size", "400KB", "--rounds", "1", "--saves", "1", "--steps", "1", "--samples", "1", "--json"]
    only = ["--only", "dcp-blocking", "--contestants", "dcp-thread*"]
    result = CliRunner().invoke(app, [*command, *only, "--dir", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report.keys() == {
        *("benchmark", "machine", "device", "workload", "shard_bytes", "copy_s", "copied_by", "results", "bars")
    }
    assert [line["contestant"] for line in report["results"]] == PEERS[:4]
    for line in report["results"]:
        assert line.keys() == LINE
        assert (line["wrong"], line["problem"], line["checked"]) == ([], "", 2)
        assert line["times_copy"] == pytest.approx(line["stall_s"] / report["copy_s"])
    assert report["device"] == "cpu"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_dcp_by_processes(tmp_path: Path) -> None:
    report = measure_async(spec_of("dcp-process*"), str(tmp_path), no_progress)
    assert [line.contestant for line in report.results] == PEERS[4:]
    assert [(line.wrong, line.problem, line.checked) for line in report.results] == [((), "", 2)] * 3


@pytest.mark.slow
def test_a_table(tmp_path: Path) -> None:
    command = ["async", "--size", "400KB", "--ranks", "1", "--rounds", "1", "--saves", "1", "--steps", "1", "--samples", "1"]
    only = ["--only", "no-*", "--only", "shardckpt-blocking", "--only", "shardckpt-eager-thread"]
    result = CliRunner().invoke(app, [*command, *only, "--dir", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row[0] for row in rows if row[-3:] == ["2", "of", "2"]] == ENGINES[:2]
    assert "plain copy: " in result.stdout
    assert "stall / plain copy" in result.stdout


# ---- contestants that are not what they should be


@dataclass(frozen=True, slots=True, kw_only=True)
class Late(Entrant):
    """Saves the state as it is some time after the call, when there is training beside it."""

    name: str = "late"
    how: str = "save(...) when it is too late"
    side: str = "shardckpt"

    def open(self, folder: str, training: Training) -> Saver:
        return LateSaver(Engine(name="inner", options=Options(), wait=True).open(folder, training))


class LateSaver(Saver):
    def __init__(self, inner: Saver) -> None:
        self._inner = inner

    def save(self, number: int) -> Flight:
        return LateFlight(self._inner, number) if number else self._inner.save(number)

    def load(self, number: int) -> None:
        self._inner.load(number)

    def close(self) -> None:
        self._inner.close()


class LateFlight(Flight):
    def __init__(self, saver: Saver, number: int) -> None:
        self._saver, self._number, self._steps = saver, number, 0

    def before_update(self) -> None:
        self._steps += 1
        if self._steps == 2:
            self._saver.save(self._number)

    def wait(self) -> None:
        pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Failing(Entrant):
    """Raises on the last rank."""

    name: str
    where: str
    how: str = "save(...), which fails"
    side: str = "dcp"

    def open(self, folder: str, training: Training) -> Saver:
        return FailingSaver(self.where)


class FailingSaver(Saver):
    def __init__(self, where: str) -> None:
        self._where = where
        self._reach("open")

    def save(self, number: int) -> Flight:
        self._reach("save")
        return FailingFlight(self)

    def load(self, number: int) -> None:
        self._reach("load")

    def close(self) -> None:
        pass

    def _reach(self, where: str) -> None:
        if where == self._where and os.environ["RANK"] == "1":
            raise OSError(f"no luck with {where}")

    def wait(self) -> None:
        self._reach("wait")


class FailingFlight(Flight):
    def __init__(self, saver: FailingSaver) -> None:
        self._saver = saver

    def wait(self) -> None:
        self._saver.wait()


def contest_of_liars(report: OnProgress, job: AsyncJob) -> AsyncOutcome:
    entrants: Sequence[Entrant] = [
        Late(),
        *(Failing(name=f"fails-in-{where}", where=where) for where in ("open", "save", "wait", "load")),
        Nobody(),
    ]
    return AsyncContest(report, job, entrants).run()


@pytest.mark.slow
def test_those_that_lie_or_fail_are_named_and_the_others_go_on(tmp_path: Path) -> None:
    job = AsyncJob(folder=str(tmp_path), nbytes=SIZE, rounds=1, saves=2, steps=2, samples=1, contestants=(), device="cpu")
    late, *failing, nobody = run_ranks(2, contest_of_liars, job, no_progress)[0].turns
    assert late.checked == 3
    assert [wrong.partition(":")[0] for wrong in late.wrong] == ["save 1", "save 2"]
    assert "token.weight" in late.wrong[0]
    assert [turn.problem for turn in failing] == ["it failed on another rank"] * 4
    assert [len(turn.cycles) for turn in failing] == [0, 0, 0, 3]
    assert (nobody.problem, len(nobody.cycles)) == ("", 3)


# ---- who takes part


def test_contestants_are_chosen_by_pattern() -> None:
    names = [entrant.name for entrant in all_entrants(cuda=False)]
    assert names == ["no-checkpoints", *ENGINES, *PEERS]
    assert [e.name for e in choose((), cuda=False)] == names
    assert [e.name for e in choose(("*-lazy*",), cuda=False)] == [name for name in names if "lazy" in name]
    with pytest.raises(ConfigError, match=r"'dpc-\*' matches no contestant; there are no-checkpoints, "):
        choose(("dcp-*", "dpc-*"), cuda=False)
    assert {e.name for e in all_entrants(cuda=True)} - {*names} == {
        *("dcp-thread-pinned", "dcp-thread-pinned-lazy", "dcp-process-pinned", "dcp-process-pinned-lazy")
    }


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    ranks = torch.cuda.device_count() + 1
    with pytest.raises(ConfigError, match=f"needs a GPU for each of {ranks} ranks, and torch finds {ranks - 1} here"):
        measure_async(AsyncSpec(nbytes=SIZE, ranks=ranks, device="cuda"), str(tmp_path))
    result = CliRunner().invoke(app, ["async", "--device", "tpu"])
    assert isinstance(result.exception, ConfigError)
    assert "--device 'tpu' is not one of auto, cpu, cuda" in str(result.exception)


def test_what_contestants_do() -> None:
    by_name = {entrant.name: entrant for entrant in all_entrants(cuda=False)}
    assert {name for name, entrant in by_name.items() if entrant.blocking} == {"shardckpt-blocking", "dcp-blocking"}
    assert {name for name, entrant in by_name.items() if entrant.copies == "later"} == {
        *("shardckpt-lazy-thread", "shardckpt-lazy-process", "dcp-thread-lazy", "dcp-process-lazy")
    }
    assert by_name["shardckpt-lazy-process"].how == "save(...) with stage='lazy', background='process'"
    assert by_name["dcp-process-kept"].how == "async_save(...) by a process, DefaultStager(use_shared_memory=True)"


# ---- what is trained


def train() -> list[bool]:
    """Whether the digests tell: no change, a step, one changed element, new parameters."""
    training = Training(GPTShape.of_size(SIZE), samples=1)
    before = training.digests()
    same = training.digests() == before
    training.step()
    stepped = training.digests()
    untouched = [name for name in before if stepped[name] == before[name]]
    with torch.no_grad():
        training.model.norm.weight.to_local()[-1] += 1  # type: ignore[attr-defined]
    changed = [name for name, digest in training.digests().items() if digest != stepped[name]]
    training.poison()
    training.restart()
    sane = all(torch.isfinite(p.to_local()).all() for p in training.model.parameters())  # type: ignore[attr-defined]
    return [same, not untouched, changed == ["norm.weight"], sane]


@pytest.mark.slow
def test_training_changes_every_tensor_and_digests_tell(ranks: RankPool) -> None:
    assert ranks.run(2, train) == [[True] * 4] * 2


@pytest.mark.slow
def test_torch_without_stagers_is_told_as_such() -> None:
    script = (
        "import sys; sys.modules['shardckpt.bench.async_peers'] = None\n"
        "from shardckpt.bench.async_entrants import choose\n"
        "choose([], cuda=False)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"DCP of torch {torch.__version__} has no stagers to compare with, torch 2.9 is the first that has" in done.stderr
