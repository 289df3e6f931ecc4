# SPDX-License-Identifier: Apache-2.0
"""A job of ``shardckpt run`` on one machine: each agent stands for a node with one process, and can be killed like one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import psutil
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not list it

from launch.elastic_proof import ROOT, begun, read_start

TRAIN = Path(__file__).with_name("elastic_train.py")
HOST = "127.0.0.1"
# The others take a node for dead after 15 s without a sign of life, and wait 4 s for more nodes when they have met.
RENDEZVOUS = "is_host=0,join_timeout=900,last_call_timeout=4,keep_alive_interval=1,keep_alive_max_attempt=15"
SAVE_SECONDS = 15
"""How long ranks wait in a save for one that was killed."""
PATIENCE = 600.0
"""Seconds until the job has to do what it is waited for, which takes half a minute where there is processor time."""
_POLL_SECONDS = 0.2
_WITHIN = 300.0


class Stuck(Exception):
    """The job does not do what it should; the message ends with what agents and workers have printed last."""


class Job:
    """Agents, and what becomes of the training that they keep up. What it does is told line by line."""

    def __init__(self, directory: Path, tell: Callable[[str], None], nodes: int) -> None:
        """Without agents so far; ``nodes`` is how many it may have at once. All files are in ``directory``."""
        self.directory = directory
        self._tell = tell
        self._nodes = nodes
        # here, as on a head node, so that no agent is needed by the others
        self._meeting = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        self._output: IO[bytes] = (directory / "output").open("ab")
        self._agents: dict[int, subprocess.Popen[bytes]] = {}
        self._left_behind: list[psutil.Process] = []
        self._told = 0
        self._begun_before = 0

    def join(self, *numbers: int) -> None:
        """Start the agents of these nodes."""
        self._begun_before = self.begun()
        command = [sys.executable, "-m", "shardckpt", "run", f"--root={self.directory / ROOT}", f"--timeout={SAVE_SECONDS}"]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={HOST}:{self._meeting.port}", f"--rdzv-conf={RENDEZVOUS}"]
        command += ["--rdzv-id=elastic", f"--local-addr={HOST}", f"--nnodes=1:{self._nodes}", "--nproc-per-node=1"]
        command += ["--max-restarts=100", "--", str(TRAIN), str(self.directory)]
        # torch looks up the names of clients; where nobody answers, it shall not wait for long
        environment = {"OMP_NUM_THREADS": "1", "RES_OPTIONS": "timeout:1 attempts:1", **os.environ}
        for number in numbers:
            self._agents[number] = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._output
            )

    def kill_worker(self, number: int) -> None:
        """SIGKILL the process that trains on a node; its agent stays."""
        self._begun_before = self.begun()
        for worker in self._workers(number):
            worker.kill()

    def kill_agent(self, number: int, *, workers: bool) -> None:
        """SIGKILL the agent of a node; with ``workers`` all that it has started, as when the power of the node goes."""
        self._begun_before = self.begun()
        left = self._workers(number)
        agent = self._agents.pop(number)
        agent.kill()
        agent.wait(_WITHIN)
        if workers:
            _kill(left)
        else:
            self._left_behind += left

    def freeze(self, number: int) -> None:
        """Stop all processes of a node where they are, as when its network hangs."""
        self._begun_before = self.begun()
        for process in (psutil.Process(self._agents[number].pid), *self._workers(number)):
            process.suspend()

    def wake(self, number: int) -> None:
        """Let them go on."""
        self._begun_before = self.begun()
        for process in (*self._workers(number), psutil.Process(self._agents[number].pid)):
            process.resume()

    def preempt(self, number: int) -> None:
        """SIGTERM to the agent of a node, as a cluster that takes it away does; returns when it has left."""
        self._begun_before = self.begun()
        agent = self._agents.pop(number)
        agent.terminate()
        agent.wait(_WITHIN)

    def until_training(self, ranks: int) -> None:
        """Wait until a start on so many ranks, that began after what was done last, has saved."""

        def is_training() -> bool:
            number = self.begun() - 1
            if number < self._begun_before:
                return False
            newest = read_start(self.directory, number)
            return newest.ranks == ranks and bool(newest.saved)

        self._until(is_training, f"save on {ranks} processes")

    def until_gone(self) -> int:
        """Wait until what killed agents have left behind has ended; how many processes that were."""
        _, alive = psutil.wait_procs(self._left_behind, timeout=PATIENCE)
        if alive:
            raise Stuck(f"{alive} were left behind, and do not end\n{self.output()}")
        return len(self._left_behind)

    def end(self) -> None:
        """Have it save once more, and end; all agents have to come to their end with status 0."""
        (self.directory / "stop").touch()
        self._until(lambda: all(agent.poll() == 0 for agent in self._agents.values()), "end")

    def begun(self) -> int:
        """How many starts it has had so far; tells of those that are new."""
        count = begun(self.directory)
        for number in range(self._told, count):
            start = read_start(self.directory, number)
            resumes = f"from step {start.first - 1}" if start.first > 1 else "from the beginning"
            self._tell(f"start {number}: {resumes}, on {start.ranks} process{'es' * (start.ranks > 1)}")
        self._told = count
        return count

    def output(self) -> str:
        """The end of what agents and workers have printed."""
        return (self.directory / "output").read_text(errors="replace")[-8000:]

    def close(self) -> None:
        """Kill what is left."""
        for number in list(self._agents):
            self.kill_agent(number, workers=True)
        _kill(self._left_behind)
        self._output.close()

    def _workers(self, number: int) -> list[psutil.Process]:
        try:
            return psutil.Process(self._agents[number].pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def _until(self, condition: Callable[[], bool], wanted: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            ended = {number: agent.returncode for number, agent in self._agents.items() if agent.poll() is not None}
            if any(ended.values()):
                raise Stuck(f"the agents of nodes ended, by status: {ended}\n{self.output()}")
            if time.monotonic() > deadline:
                raise Stuck(f"it did not {wanted} within {PATIENCE:g} s\n{self.output()}")
            time.sleep(_POLL_SECONDS)


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=_WITHIN)
