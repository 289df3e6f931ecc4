# SPDX-License-Identifier: Apache-2.0
"""The batch script for Slurm: what it asks for is sound, and it saves, leaves, requeues and goes on when Slurm says so."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import shardckpt
from tests.launch.cluster import Cluster

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "slurm.sbatch"
TRAIN = ROOT / "tests" / "preemption" / "train.py"
TEXT = SCRIPT.read_text()
# Options of sbatch with the form of their values, from its manual page.
FORMS = {
    "job-name": r"[\w.-]+",
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"([\w.-]+:)?\d+",
    "cpus-per-task": r"\d+",
    "mem": r"\d+[KMGT]?",
    "time": r"(\d+-)?\d+(:\d\d){1,2}",
    "requeue": "",
    "no-kill": "",
    "open-mode": "append|truncate",
    "output": r"\S+",
    "signal": r"[RB]*:?(SIG)?[A-Z]+\d?@\d+",
}


def directives(text: str) -> dict[str, str]:
    """The options of a batch script as sbatch reads them: up to the first line that is neither empty nor a comment."""
    options = {}
    for line in text.splitlines()[1:]:
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            name, _, value = line.removeprefix("#SBATCH").strip().removeprefix("--").partition("=")
            options[name] = value
    return options


def seconds(text: str) -> int:
    """A time limit, D-H:M:S with fewer parts allowed as by sbatch for those with a colon."""
    days, _, clock = text.rpartition("-")
    hours, minutes, rest = (int(part) for part in clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def test_sbatch_reads_every_directive() -> None:
    assert len(directives(TEXT)) == len(re.findall(r"^#SBATCH", TEXT, re.MULTILINE))


@pytest.mark.parametrize(("option", "value"), directives(TEXT).items())
def test_directives_are_ones_that_sbatch_has(option: str, value: str) -> None:
    assert re.fullmatch(FORMS[option], value)


def test_the_signal_leaves_time_for_the_save_and_comes_before_the_limit() -> None:
    found = directives(TEXT)
    named = re.fullmatch(r"B:USR1@(\d+)", found["signal"])
    grace = re.search(r"^GRACE=(\d+)$", TEXT, re.MULTILINE)
    assert named
    assert grace
    # Slurm rounds the moment of the signal to a minute
    assert int(grace[1]) + 60 <= int(named[1]) < seconds(found["time"])
    assert int(named[1]) <= 65535
    assert "trap preempt USR1" in TEXT


def test_the_example_deals_its_batch_out_to_any_number_of_its_nodes() -> None:
    found = directives(TEXT)
    batch = re.search(r"--batch (\d+)", TEXT)
    assert batch
    for nodes in range(1, int(found["nodes"]) + 1):
        assert int(batch[1]) % (nodes * int(found["gpus-per-node"])) == 0


def test_one_task_per_node_starts_the_processes_of_all_its_gpus() -> None:
    assert directives(TEXT)["ntasks-per-node"] == "1"
    assert '--nproc-per-node="${SLURM_GPUS_ON_NODE:-1}"' in TEXT


def test_it_passes_shellcheck() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert subprocess.run(["bash", "-n", SCRIPT], timeout=60).returncode == 0


def test_run_as_a_common_script_it_says_what_it_is(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", SCRIPT], cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert "this is a batch script: sbatch launch/slurm.sbatch" in done.stderr


def job_number() -> str:
    """The number of a job whose port, which the script makes of it, is free."""
    for number in range(time.time_ns() % 5000, 10000):
        with socket.socket() as probe:
            try:
                probe.bind(("", 20000 + number))
            except OSError:
                continue
            return str(number)
    raise AssertionError("no port from 20000 to 30000 is free")


def fake_agent(cluster: Cluster, body: str) -> None:
    """Put this in the place of ``shardckpt run``, and something that only waits in that of ``shardckpt rendezvous``."""
    place = cluster.place / ".venv" / "bin"
    place.mkdir(parents=True)
    meeting = '[[ "$1" == rendezvous ]] && { echo "rendezvous $*"; exec sleep 1000; }'
    (place / "shardckpt").write_text(f"#!/usr/bin/env bash\n{meeting}\n{body}")
    (place / "shardckpt").chmod(0o755)


def wait_for(file: Path, pattern: str, job: subprocess.Popen[str], count: int = 1) -> None:
    """Wait until lines of a file match; fails when the job ends before, or after four minutes."""
    deadline = time.monotonic() + 240
    while len(re.findall(pattern, file.read_text(), re.MULTILINE)) < count:
        assert job.poll() is None, file.read_text()
        assert time.monotonic() < deadline, file.read_text()
        time.sleep(0.05)


@pytest.mark.parametrize("status", [0, 3])
def test_a_job_that_ends_by_itself_keeps_its_status_and_is_not_requeued(tmp_path: Path, status: int) -> None:
    cluster = Cluster(tmp_path)
    fake_agent(cluster, f'echo "agent $*; $SHARDCKPT_RUN"; exit {status}')
    log = tmp_path / "log"
    with log.open("w") as output:
        job = cluster.start(SCRIPT, ["mine.py", "--lr", "1"], output, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="2")
        assert job.wait(60) == status
    assert cluster.requeued == []
    printed = log.read_text()
    for option in ("--nnodes=1:2", "--nproc-per-node=1", "--rdzv-id=7-2"):
        assert len(re.findall(f"^agent run.* {option} ", printed, re.MULTILINE)) == 2
    # starts of a job that was requeued are starts of one run, of which only the newest may save
    assert printed.count(" -- mine.py --lr 1; train\n") == 2
    # at the node of the script, and in no agent: each of their nodes may fail
    assert printed.count("rendezvous --port 20007\n") == 1
    assert printed.count(" --rdzv-endpoint=localhost:20007 --rdzv-conf=is_host=0,") == 3
    assert re.search("^srun .*--no-kill --kill-on-bad-exit=0 ", printed, re.MULTILINE)


def test_a_job_whose_processes_slurm_itself_told_to_stop_is_requeued(tmp_path: Path) -> None:
    """As when it is preempted where slurm.conf does not say send_user_signal: this script hears nothing of it."""
    cluster = Cluster(tmp_path)
    fake_agent(cluster, "trap 'exit 143' TERM; echo ready; while :; do sleep 0.05; done")
    log = tmp_path / "log"
    log.touch()
    with log.open("w") as output:
        job = cluster.start(SCRIPT, ["mine.py"], output, SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="64")
        wait_for(log, "^ready$", job, count=2)
        cluster.signal("TERM")
        assert job.wait(60) == 143, log.read_text()
    assert cluster.requeued == ["7"]
    assert " --cpus-per-task=64 " in log.read_text()


@pytest.mark.parametrize(("status", "requeued"), [(0, []), (1, ["7"])])
def test_a_job_told_to_stop_is_requeued_unless_it_was_done(tmp_path: Path, status: int, requeued: list[str]) -> None:
    """The signal comes twice, as it may when a job is preempted shortly before its limit; the save is not disturbed."""
    cluster = Cluster(tmp_path)
    # only SIGTERM ends it, and not before the file is there
    body = f"""
trap 'while [[ ! -e saved ]]; do sleep 0.05; done; echo saved; exit {status}' TERM
echo "in $TORCH_ELASTIC_SHUTDOWN_TIMEOUT s"
while :; do sleep 0.05; done
"""
    fake_agent(cluster, body)
    log = tmp_path / "log"
    log.touch()
    with log.open("w") as output:
        job = cluster.start(SCRIPT, ["mine.py"], output, SLURM_JOB_ID="7")
        wait_for(log, "^in 240 s$", job, count=2)
        job.send_signal(signal.SIGUSR1)
        wait_for(log, "SIGUSR1", job)
        job.send_signal(signal.SIGUSR1)
        assert cluster.requeued == []
        (tmp_path / "saved").touch()
        assert job.wait(60) == status, log.read_text()
    assert log.read_text().count("saved\n") == 2
    assert cluster.requeued == requeued


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_nodes_save_when_they_are_preempted_and_one_goes_on(tmp_path: Path) -> None:
    """Statuses of torchrun are not looked at: that of agents whose peers are gone is any but 0."""
    cluster, number, root = Cluster(tmp_path), job_number(), tmp_path / "checkpoints"
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parents[1])
    log, again = tmp_path / "log", tmp_path / "again"
    log.touch()
    arguments = [str(TRAIN), f"--root={root}"]
    with log.open("w") as output:
        job = cluster.start(SCRIPT, arguments, output, SLURM_JOB_ID=number)
        wait_for(log, r"^rank \d step 10$", job, count=2)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(240) != 0, log.read_text()
    assert cluster.requeued == [number], log.read_text()
    with shardckpt.Checkpointer(root) as ckpt:
        (last,) = ckpt.steps()
    saves = re.findall(r"^rank (\d) saves (\d+)$", log.read_text(), re.MULTILINE)
    assert sorted(saves) == [("0", str(last)), ("1", str(last))]
    arguments.append(f"--steps={last + 1}")
    with again.open("w") as output:
        job = cluster.start(SCRIPT, arguments, output, SLURM_JOB_ID=number, SLURM_RESTART_COUNT="1", SLURM_JOB_NUM_NODES="1")
        assert job.wait(240) == 0, again.read_text()
    assert f"rank 0 begins at {last + 1}, " in again.read_text()
    assert f"rank 0 step {last + 1}\n" in again.read_text()
    assert cluster.requeued == [number]
