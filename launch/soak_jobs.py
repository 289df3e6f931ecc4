# SPDX-License-Identifier: Apache-2.0
"""Starts of the job of `launch.soak_train`, and their end by SIGKILL."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from launch.soak_train import LOST, Job, main

LAUNCHERS = ("fork", "torchrun")
MARK = "SHARDCKPT_SOAK"
PATIENCE = 240.0
"""Seconds in which a job has to come to its end, and whatever it has left behind."""
LONG, SHORT = 120.0, 6.0
"""Seconds that ranks wait for each other: where nobody is left alone, and where those whose peers died have to find out."""


class Failed(Exception):
    """Something was seen that must not be."""


@dataclass(slots=True, kw_only=True)
class Plan:
    """One start of the job, and how it ends."""

    launcher: str
    leg: int
    world_size: int
    seed: int
    columns: int
    keep_last: int | None
    keep_every: int | None
    steps: int
    every: int
    blocking: bool
    stage: str
    background: str
    ring: bool
    readback: bool
    parity: bool
    victims: str
    """``one`` rank, ``all`` ranks, ``everything`` (the processes that save in the background too), or the one of one rank."""
    victim: int
    """Rank."""
    fatal_call: int
    """Number of the call to the file system that kills the victim; 0 when it is killed after some time."""
    after: float
    """Seconds, from the moment that all ranks have come together, or when ``early`` from the start."""
    early: bool
    survivors: str
    """Whether those that are not killed are ``terminated``, as torchrun does, or ``left`` to find out."""
    haste: bool
    """Whether the next start does not wait for background processes of this one."""
    killed: bool = False
    """Whether somebody was, in the end: a job may be over before."""

    @property
    def may_fail(self) -> bool:
        """Whether saves and ranks may: somebody was killed, or they have so little patience that a busy machine uses it up."""
        return self.killed or self.survivors == "left"

    def describe(self) -> str:
        """One line."""
        how = "blocking" if self.blocking else f"{self.stage} {self.background}{' ring' * self.ring}"
        how += " readback" * self.readback + " parity" * self.parity
        when = f"at call {self.fatal_call}" if self.fatal_call else f"after {self.after:.2f} s{' of the start' * self.early}"
        who = f"{self.victims} ({self.victim})" if self.victims in ("one", "background") or self.fatal_call else self.victims
        end = f"killed {who} {when}, others {self.survivors}" if self.killed else "ran to its end"
        return f"start {self.leg} ({self.launcher}, {self.world_size} ranks, {how}, every {self.every}): {end}"

    def job(self, work: Path) -> Job:
        """What the ranks get to know."""
        return Job(
            root=str(work / "root"),
            logs=str(work / "logs"),
            seed=self.seed,
            leg=self.leg,
            columns=self.columns,
            steps=self.steps,
            every=self.every,
            blocking=self.blocking,
            stage=self.stage,
            background=self.background,
            ring=self.ring,
            readback=self.readback,
            parity=self.parity,
            keep_last=self.keep_last,
            keep_every=self.keep_every,
            timeout=SHORT if self.survivors == "left" else LONG,
            victim=self.victim if self.fatal_call else None,
            fatal_call=self.fatal_call,
        )


class Launch:
    """A job that runs."""

    def __init__(self, plan: Plan, work: Path, mark: str) -> None:
        self.plan, self.work, self.mark = plan, work, mark
        self.logs = work / "logs"
        self.logs.mkdir(exist_ok=True)
        self.output = work / f"leg-{plan.leg:03}.out"
        self.deadline = time.monotonic() + PATIENCE
        start = _Torchrun if plan.launcher == "torchrun" else _Forked
        self.ranks: _Torchrun | _Forked = start(plan.job(work), plan.world_size, self.output, mark)

    def run(self) -> None:
        """Until all ranks have ended, in one way or another; raises `Failed` when they end otherwise than they should."""
        try:
            if not self.plan.fatal_call:
                self._kill_in_time()
                self._follow_up()
            self._wait(self._is_over, "the ranks do not come to their end")
        finally:
            self.ranks.kill()
        self._check_statuses()

    def _is_over(self) -> bool:
        if self.plan.fatal_call and not self.plan.killed and self.ranks.was_killed(self.plan.victim):
            self.plan.killed = True
            self._follow_up()
        return not self.ranks.running()

    def _follow_up(self) -> None:
        """What becomes of the others when the victim is dead."""
        plan = self.plan
        if plan.killed and plan.victims == "all":
            self.ranks.kill()
        elif plan.killed and plan.victims != "background" and plan.survivors == "terminated":
            self.ranks.terminate()

    def _kill_in_time(self) -> None:
        plan = self.plan
        if not plan.early:
            self._wait(lambda: self.ranks.any_ended() or len(self._pids()) == plan.world_size, "the ranks do not come together")
        until = time.monotonic() + plan.after
        while time.monotonic() < until and self.ranks.running():
            time.sleep(0.002)
        self._kill()

    def _kill(self) -> None:
        plan = self.plan
        match plan.victims:
            case "one":
                plan.killed = self.ranks.kill_one(plan.victim, self._pids())
            case "background":
                plan.killed = self._kill_background()
            case _:
                plan.killed = self.ranks.running()
                if plan.victims == "everything":
                    for process in stragglers(self.mark):
                        with suppress(psutil.NoSuchProcess):
                            process.kill()
                self.ranks.kill()

    def _kill_background(self) -> bool:
        """The background process of the victim, if it has one."""
        pid = self._pids().get(self.plan.victim)
        for process in stragglers(self.mark):
            with suppress(psutil.NoSuchProcess):
                if process.ppid() == pid and "shardckpt.background" in process.cmdline():
                    process.kill()
                    return True
        return False

    def _pids(self) -> dict[int, int]:
        """Of the ranks that have come to train."""
        found = {}
        for rank in range(self.plan.world_size):
            path = self.logs / f"leg-{self.plan.leg:03}-rank-{rank}.log"
            lines = path.read_text().splitlines() if path.exists() else []
            if lines and (entry := json.loads(lines[0]))["what"] == "begin":
                found[rank] = entry["pid"]
        return found

    def _wait(self, condition: Callable[[], object], problem: str) -> None:
        while not condition():
            if time.monotonic() > self.deadline:
                raise Failed(f"{problem} within {PATIENCE:g} s; output:\n{self.output.read_text(errors='replace')[-8000:]}")
            time.sleep(0.002)

    def _check_statuses(self) -> None:
        statuses = self.ranks.statuses()
        accepted = {0, LOST, -signal.SIGKILL, -signal.SIGTERM} if self.plan.may_fail else {0}
        if self.plan.victims == "background" and self.plan.survivors != "left":
            accepted = {0}
        if not accepted.issuperset(statuses):
            text = self.output.read_text(errors="replace")[-8000:]
            raise Failed(f"ranks ended with {statuses} where only {sorted(accepted)} are good; output:\n{text}")


class _Forked:
    """Ranks that are forked from a process that has imported torch."""

    def __init__(self, job: Job, world_size: int, output: Path, mark: str) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        # it outlives the ranks, as torchrun's does
        self._store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=LONG), wait_for_workers=False)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["launch.soak_train", "torch.distributed.fsdp"])
        common = {
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "OMP_NUM_THREADS": "1",
            MARK: mark,
        }
        output.touch()
        self._processes: list[Any] = []
        for rank in range(world_size):
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=serve, args=(job, environment, str(output)))
            process.start()
            self._processes.append(process)

    def running(self) -> bool:
        """Whether any is."""
        return any(process.is_alive() for process in self._processes)

    def any_ended(self) -> bool:
        """Whether any has ended."""
        return not all(process.is_alive() for process in self._processes)

    def was_killed(self, rank: int) -> bool:
        """Whether a rank has died by SIGKILL."""
        return bool(self._processes[rank].exitcode == -signal.SIGKILL)

    def kill_one(self, rank: int, pids: dict[int, int]) -> bool:
        """Kill a rank; False when it has ended before."""
        process = self._processes[rank]
        if not process.is_alive():
            return False
        process.kill()
        return True

    def terminate(self) -> None:
        """SIGTERM to all."""
        for process in self._processes:
            process.terminate()

    def kill(self) -> None:
        """SIGKILL to all, and wait for their end."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def statuses(self) -> list[int]:
        """Exit statuses; negative for signals."""
        return [process.exitcode for process in self._processes]


def serve(job: Job, environment: dict[str, str], output: str) -> None:
    """Be a rank, in a new process."""
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os._exit(main(job, environment))


class _Torchrun:
    """Ranks under a torchrun of their own."""

    def __init__(self, job: Job, world_size: int, output: Path, mark: str) -> None:
        description = output.with_suffix(".json")
        description.write_text(job.to_json())
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
        command += ["-m", "launch.soak_train", str(description)]
        names = {"OMP_NUM_THREADS": "1", "RES_OPTIONS": "timeout:1 attempts:1", MARK: mark}
        self._mark = mark
        with output.open("w") as file:
            self._agent = subprocess.Popen(
                command,
                cwd=Path(__file__).parents[1],
                env={**os.environ, **names},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def running(self) -> bool:
        """Whether the agent is, which waits for its workers."""
        return self._agent.poll() is None

    def any_ended(self) -> bool:
        """Whether the job is over: torchrun ends it when any rank does badly."""
        return not self.running()

    def was_killed(self, rank: int) -> bool:
        """Whether some rank has failed: the agent tells no more, and does with the others what it does."""
        return self._agent.poll() == 1

    def kill_one(self, rank: int, pids: dict[int, int]) -> bool:
        """Kill a rank; False when it has ended before, or has not begun."""
        if rank not in pids or not self.running():
            return False
        try:
            os.kill(pids[rank], signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def terminate(self) -> None:
        """The agent does so when it finds a rank dead."""

    def kill(self) -> None:
        """SIGKILL to the agent and all workers, and wait for their end."""
        with suppress(psutil.NoSuchProcess):
            agent = psutil.Process(self._agent.pid)
            if self._agent.poll() is None:
                # it starts none while it stands still
                agent.suspend()
            workers = [child for child in agent.children(recursive=True) if "shardckpt.background" not in child.cmdline()]
            agent.kill()
            for process in workers:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(workers, timeout=PATIENCE)
        self._agent.wait()

    def statuses(self) -> list[int]:
        """That of the agent, as a rank's: it is 1 when any rank has failed."""
        status = self._agent.wait()
        return [LOST if status == 1 else status]


def stragglers(mark: str) -> list[psutil.Process]:
    """Living processes of a chain: those of torchrun, and background processes, whoever their parent is by now."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_for_stragglers(mark: str) -> None:
    """Return when none is left; raises `Failed` when some do not end."""
    left = psutil.wait_procs(stragglers(mark), timeout=PATIENCE)[1]
    if left:
        raise Failed(f"processes do not end: {[process.cmdline() for process in left]}")
