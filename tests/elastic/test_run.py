# SPDX-License-Identifier: Apache-2.0
"""``shardckpt run``: what it takes for itself, what it passes on, and a job that loses a rank, goes on, and grows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shardckpt.cli.run import handed_over
from shardckpt.environment import default_root, default_signals, default_timeout, run_name
from shardckpt.errors import ConfigError
from shardckpt.options import Options
from tests.cli.run import run
from tests.elastic.train import BATCH, FATAL_STEP, SAMPLES, SAVE_EVERY, STATUS

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


def test_what_the_script_gets_to_see() -> None:
    assert handed_over(None, None, None) == {"SHARDCKPT_ANNOUNCE": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    names = handed_over("run", 30.0, "USR1")
    assert names["SHARDCKPT_ROOT"] == os.path.abspath("run")
    assert handed_over("s3://bucket/run", None, None)["SHARDCKPT_ROOT"] == "s3://bucket/run"
    assert (default_timeout(names), default_signals(names)) == (30.0, (signal.SIGUSR1,))
    assert names["PET_SIGNALS_TO_HANDLE"] == "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def ended(command: list[str], root: Path | None = None) -> tuple[int, str]:
    """Status and output of a launcher that runs to its end."""
    names = {"OMP_NUM_THREADS": "1", "RES_OPTIONS": "timeout:1 attempts:1"}
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


def test_nodes_that_may_come_later_meet_where_they_can(tmp_path: Path) -> None:
    """Torchrun's own default would wait for both."""
    script = tmp_path / "script.py"
    script.write_text("import os; raise SystemExit(3 if os.environ['WORLD_SIZE'] == '2' else 4)")
    options = ["--nnodes=1:2", "--nproc-per-node=2", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-conf=last_call_timeout=1"]
    status, output = ended(["shardckpt", "run", *options, "--", str(script)])
    assert status == 3, output
    assert "rank 0 ended with status 3" in output or "rank 1 ended with status 3" in output


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
