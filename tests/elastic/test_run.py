# SPDX-License-Identifier: Apache-2.0
"""``shardckpt run``: what it takes for itself, what it passes on, and a job that loses a rank, goes on, and grows."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from launch.elastic_job import TRAIN as ELASTIC_TRAIN
from launch.elastic_proof import begun, prove_directory, read_start
from shardckpt.cli.run import handed_over, name_of_run
from shardckpt.environment import default_root, default_signals, default_timeout, run_name
from shardckpt.errors import ConfigError
from shardckpt.options import Options
from tests.cli.run import run
from tests.elastic.train import BATCH, FATAL_STEP, SAMPLES, SAVE_EVERY, STATUS
from tests.engine.waiting import until

TRAIN = Path(__file__).with_name("train.py")


def test_the_environment_stands_in_for_arguments() -> None:
    assert default_root({"SHARDCKPT_ROOT": "/a"}) == "/a"
    assert (default_timeout({}), default_timeout({"SHARDCKPT_TIMEOUT": "7.5"})) == (600.0, 7.5)
    assert default_signals({}) == ()
    assert default_signals({"SHARDCKPT_SIGNAL": "usr1, SIGTERM,15"}) == (signal.SIGUSR1, signal.SIGTERM)
    assert run_name({"TORCHELASTIC_RUN_ID": "a"}) == "a"
    assert run_name({"TORCHELASTIC_RUN_ID": "a", "SHARDCKPT_RUN": "b"}) == "b"
    assert run_name({"TORCHELASTIC_RUN_ID": "none"}) is run_name({}) is None
    assert Options(timeout=5.0).timeout == 5.0


def test_what_the_environment_holds_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="SHARDCKPT_ROOT"):
        default_root({})
    with pytest.raises(ConfigError, match="SHARDCKPT_TIMEOUT='soon'"):
        default_timeout({"SHARDCKPT_TIMEOUT": "soon"})
    with pytest.raises(ConfigError, match="'NONSENSE' is no signal"):
        default_signals({"SHARDCKPT_SIGNAL": "TERM,NONSENSE"})


def test_wrong_usage() -> None:
    for arguments in ([], ["train.py"], ["--nproc-per-node", "2", "train.py"], ["--"]):
        done = run("run", *arguments)
        assert (done.status, done.out) == (2, "")
        assert "write -- before the script" in done.err
    done = run("run", "--signal", "NONSENSE", "--", "train.py")
    assert done.status == 2
    assert "--signal='NONSENSE'" in done.err
    done = run("run", "--timeout", "-5", "--", "train.py")
    assert done.status == 2
    assert "timeout must be a positive, finite number of seconds, got -5.0" in done.err


def test_what_the_script_gets_to_see() -> None:
    always = {"SHARDCKPT_ANNOUNCE": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    assert handed_over(None, None, None, {}) == always
    names = handed_over("run", 30.0, "USR1", {})
    assert names["SHARDCKPT_ROOT"] == os.path.abspath("run")
    assert handed_over("s3://bucket/run", None, None, {})["SHARDCKPT_ROOT"] == "s3://bucket/run"
    assert (default_timeout(names), default_signals(names)) == (30.0, (signal.SIGUSR1,))
    assert names["PET_SIGNALS_TO_HANDLE"] == "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def test_signals_that_the_environment_names_are_passed_on_too() -> None:
    found = handed_over(None, None, None, {"SHARDCKPT_SIGNAL": "USR2", "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGHUP"})
    assert found["PET_SIGNALS_TO_HANDLE"] == "SIGTERM,SIGHUP,SIGUSR2"
    found = handed_over(None, None, "TERM", {"SHARDCKPT_SIGNAL": "USR2"})
    assert found["PET_SIGNALS_TO_HANDLE"] == "SIGTERM,SIGINT,SIGHUP,SIGQUIT"


def test_starts_of_one_run_have_one_name() -> None:
    root = {"SHARDCKPT_ROOT": "/ckpts/run42"}
    assert name_of_run("run42", root) == "run42"
    assert name_of_run("run42", {**root, "SHARDCKPT_RUN": "mine"}) == "mine"
    assert name_of_run("none", root) == "run"
    assert name_of_run("none", {}) == ""
    assert run_name({"SHARDCKPT_RUN": name_of_run("run42", {**root, "SHARDCKPT_RUN": "none"})}) is None


def ended(command: list[str], root: Path | None = None) -> tuple[int, str]:
    """Status and output of a launcher that runs to its end."""
    names = {"RES_OPTIONS": "timeout:1 attempts:1"}
    if root is not None:
        names |= {"SHARDCKPT_ROOT": str(root), "SHARDCKPT_RUN": "job"}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env={**os.environ, **names},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=250,
    )
    return done.returncode, done.stdout


@pytest.mark.slow
def test_nodes_that_may_come_later_meet_where_they_can(tmp_path: Path) -> None:
    """Torchrun's own default would wait for both."""
    script = tmp_path / "script.py"
    script.write_text("import os; raise SystemExit(3 if os.environ['WORLD_SIZE'] == '2' else 4)")
    options = ["--nnodes=1:2", "--nproc-per-node=2", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-conf=last_call_timeout=1"]
    status, output = ended(["shardckpt", "run", *options, "--", str(script)])
    assert status == 3, output
    assert "rank 0 ended with status 3" in output or "rank 1 ended with status 3" in output


@pytest.mark.slow
def test_an_agent_that_meets_nobody_says_so_in_one_line() -> None:
    conf = "--rdzv-conf=is_host=0,read_timeout=1"
    options = ["--nnodes=1:2", "--rdzv-endpoint=127.0.0.1:9", conf]
    status, output = ended(["shardckpt", "run", *options, "--", "none.py"])
    assert status == 1
    assert "shardckpt: error: this agent cannot meet the others at 127.0.0.1:9: " in output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_a_killed_launch_has_left_behind_gives_way_to_the_next_one(tmp_path: Path) -> None:
    """On one node, where torchrun has a new name for each launch: the script trains on alone, until it comes to a save."""
    command = [sys.executable, "-m", "shardckpt", "run", f"--root={tmp_path / 'run'}", "--", str(ELASTIC_TRAIN), str(tmp_path)]
    with (tmp_path / "output").open("wb") as output:
        agents: list[subprocess.Popen[bytes]] = []
        left: list[psutil.Process] = []
        try:
            for number in (0, 1):
                agents.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output))
                until(lambda number=number: begun(tmp_path) > number and read_start(tmp_path, number).saved, 250)  # type: ignore[misc]
                if number == 0:
                    left = psutil.Process(agents[0].pid).children(recursive=True)
                    agents[0].kill()
            assert psutil.wait_procs(left, timeout=120)[1] == []
            (tmp_path / "stop").touch()
            assert agents[1].wait(120) == 0
        finally:
            for agent in agents:
                agent.kill()
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
    assert "Superseded" in (tmp_path / "output").read_text()
    assert [start.ranks for start in prove_directory(tmp_path)[0]] == [1, 1]


Consumed = dict[tuple[int, int], tuple[set[float], list[int]]]


def consumed(folder: Path) -> Consumed:
    """By start and step: the losses that ranks saw, which are to be one, and the samples of all ranks."""
    found: Consumed = {}
    for path in sorted(folder.glob("log-*")):
        for line in path.read_text().splitlines():
            start, step, loss, samples = json.loads(line)
            losses, all_samples = found.setdefault((start, step), (set(), []))
            losses.add(loss)
            all_samples += samples
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_that_loses_a_rank_goes_on_and_grows(tmp_path: Path) -> None:
    """First by ``shardckpt run`` on 2 ranks, one of which is killed; then by torchrun alone, on 3 ranks."""
    root, one, two = tmp_path / "run", tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "--root", str(root)]
    status, output = ended(["shardckpt", "run", *options, "--", str(TRAIN), str(one), "8", str(STATUS)])
    assert status == STATUS, output
    assert f"shardckpt: {root}: resumes from nothing, goes on with 2 ranks" in output
    assert f"shardckpt: {root}: resumes from step 4 of 2 ranks, goes on with 2 ranks" in output
    assert [path.name.split("-")[1] for path in (root / ".fences").iterdir()] == ["00000002"]
    before = consumed(one)
    saved = FATAL_STEP // SAVE_EVERY * SAVE_EVERY
    assert set(before) == {(0, step) for step in range(1, FATAL_STEP + 1)} | {(1, step) for step in range(saved + 1, 9)}
    # what was lost with the rank comes again, with the same samples and the same loss
    assert sorted(before[0, FATAL_STEP][1]) == sorted(before[1, FATAL_STEP][1])
    assert before[0, FATAL_STEP][0] == before[1, FATAL_STEP][0]

    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    status, output = ended([*torchrun, str(TRAIN), str(two), "10", "0"], root)
    assert status == 0, output
    assert "resumes from" not in output
    after = consumed(two)
    assert set(after) == {(0, 9), (0, 10)}
    # two epochs of 5 steps: each sample comes once in each
    history = [before[0, step] for step in range(1, saved + 1)] + [before[1, step] for step in range(saved + 1, 9)]
    history += [after[0, step] for step in (9, 10)]
    for epoch in (history[:5], history[5:]):
        assert sorted(sample for _, samples in epoch for sample in samples) == list(range(SAMPLES))
    assert all(len(losses) == 1 and len(samples) == BATCH for losses, samples in history)
    losses = [loss for seen, _ in history for loss in seen]
    assert sum(losses[5:]) < sum(losses[:5])
