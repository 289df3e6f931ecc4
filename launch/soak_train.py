# SPDX-License-Identifier: Apache-2.0
"""One rank of the training job that `launch.soak` kills: its state is a function of seed and step, in whole numbers.

It writes what it asks for and what it is told into a log of its own, each line flushed before it goes on. Exit statuses: 0,
`WRONG` when a restored value is not the saved one, `LOST` when other ranks are gone.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import shardckpt
from shardckpt.store import LocalStore, Store
from shardckpt.store.filesystem import FileSystem

WRONG, LOST = 3, 4
ROWS = 37
PAGE = 4096
CHUNK = 4 << 20
DEADLINE = 300.0
"""Seconds after which a rank that hangs says where, and ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all ranks of one start of the job do."""

    root: str
    logs: str
    """Folder of the logs."""
    seed: int
    leg: int
    """Number of this start in the life of the root, from 1."""
    columns: int
    """Of the largest tensor, which has `ROWS` rows."""
    steps: int
    """Training steps from where it resumes to where it ends."""
    every: int
    """Steps between saves."""
    blocking: bool
    stage: str
    background: str
    ring: bool
    """Whether each rank has host memory for one chunk of its file only."""
    readback: bool
    """Whether saves read back what they have written before they commit."""
    parity: bool
    """Whether all ranks together write a parity of their files, where there are several."""
    keep_last: int | None
    keep_every: int | None
    timeout: float
    """How long ranks wait for each other, in seconds."""
    victim: int | None = None
    """The rank that dies at a call of its file system, if one does."""
    fatal_call: int = 0
    """Number of that call."""

    def to_json(self) -> str:
        """Text that `from_json` takes."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job that `to_json` described."""
        return cls(**json.loads(text))


class Content:
    """The whole state after each step, as it has to be on any number of ranks: SGD with sums that float32 holds exactly."""

    def __init__(self, seed: int, columns: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.start = torch.randint(1000, (ROWS, columns), generator=generator).float()
        self.gradient = torch.randint(1, 8, (ROWS, columns), generator=generator).float()

    def momentum(self, step: int) -> torch.Tensor:
        """With a momentum of 1, gradients add up."""
        return self.gradient * step

    def weight(self, step: int) -> torch.Tensor:
        """With a learning rate of 1, so do they."""
        return self.start - self.gradient * (step * (step + 1) // 2)


class Model(nn.Module):
    """A matrix that is cut by rows, and a vector of which each rank has a copy."""

    def __init__(self, content: Content, mesh: DeviceMesh) -> None:
        super().__init__()
        self.matrix = nn.Parameter(cut(content.start, mesh))
        self.vector = nn.Parameter(content.start[0].clone())


def cut(whole: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    """This rank's rows of ``whole``, as a part of it."""
    rows = whole.chunk(mesh.size())[mesh.get_rank()].clone()
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


class Log:
    """Lines of JSON that outlive this process."""

    def __init__(self, job: Job, rank: int) -> None:
        path = Path(job.logs) / f"leg-{job.leg:03}-rank-{rank}.log"
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def __call__(self, what: str, **more: Any) -> None:
        os.write(self._fd, (json.dumps({"what": what, **more}) + "\n").encode())
        os.fsync(self._fd)


class Rank:
    """The state of one rank, its saves, and its log."""

    def __init__(self, job: Job, log: Log) -> None:
        self.job, self.log = job, log
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.content = Content(job.seed, job.columns)
        self.mesh = init_device_mesh("cpu", (self.world_size,))
        self.model = Model(self.content, self.mesh)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0, momentum=1.0, foreach=False)
        self.mark = cut(torch.zeros(ROWS, dtype=torch.int64), self.mesh)
        self.own = torch.zeros(3, dtype=torch.int64)
        self.state = {
            "model": self.model,
            "optimizer": self.optimizer,
            "mark": self.mark,
            "own": shardckpt.PerRank(self.own),
            "step": 0,
        }
        self.saves: list[shardckpt.SaveHandle] = []

    def train(self, step: int) -> None:
        """One step. The ranks keep in step by a collective, as ranks do."""
        whole = torch.zeros_like(self.content.gradient) if self.rank else self.content.gradient.clone()
        dist.all_reduce(whole)
        self.model.matrix.grad = cut(whole, self.mesh)
        self.model.vector.grad = whole[0].clone()
        self.optimizer.step()
        self.mark.to_local().fill_(self.job.leg)
        self.own.copy_(torch.tensor([self.job.leg, step, self.rank]))
        self.state["step"] = step

    def wrong(self, restored: shardckpt.Restored) -> list[str]:
        """Names of restored values that are not those of the step, or of the start of the job that saved it."""
        step, leg, saved_by = restored.step, restored.info.metadata["leg"], restored.info.world_size
        weight, momentum = self.content.weight(step), self.content.momentum(step)
        buffers = self.optimizer.state
        pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
            "matrix": (local(self.model.matrix), local(cut(weight, self.mesh))),
            "vector": (self.model.vector.data, weight[0]),
            "momentum": (local(buffers[self.model.matrix]["momentum_buffer"]), local(cut(momentum, self.mesh))),
            "vector momentum": (buffers[self.model.vector]["momentum_buffer"], momentum[0]),
            "mark": (self.mark.to_local(), torch.full_like(self.mark.to_local(), leg)),
            "step": (torch.tensor(self.state["step"]), torch.tensor(step)),
        }
        if self.rank < saved_by:
            pairs["own"] = (self.own, torch.tensor([leg, step, self.rank]))
        return [name for name, (found, expected) in pairs.items() if not torch.equal(found, expected)]

    def save(self, ckpt: shardckpt.Checkpointer, step: int) -> None:
        """Ask for a save; what other ranks' deaths make of it is no error of this job."""
        self.log("ask", step=step)
        metadata = {"leg": self.job.leg, "world_size": self.world_size}
        try:
            verify: Literal["readback"] | None = "readback" if self.job.readback else None
            self.saves.append(ckpt.save(step, self.state, metadata=metadata, wait=self.job.blocking, verify=verify))
        except (shardckpt.CoordinationError, shardckpt.BackgroundDied, shardckpt.AlreadyCommitted) as error:
            self.log("failed", step=step, error=type(error).__name__, message=str(error))

    def report(self) -> None:
        """Write down what has become of saves that are over."""
        for handle in [handle for handle in self.saves if handle.done()]:
            self.saves.remove(handle)
            try:
                handle.result()
            except shardckpt.CheckpointError as error:
                self.log("failed", step=handle.step, error=type(error).__name__, message=str(error))
            else:
                self.log("durable", step=handle.step)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of a tensor."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local().detach()


def mortal(fatal_call: int) -> FileSystem:
    """A file system in whose call of that number the process is killed, after half of the bytes if it is a write."""
    numbers = itertools.count(1)

    def dying(name: str) -> Callable[..., Any]:
        operation = getattr(FileSystem, name)

        def call(self: FileSystem, *args: Any) -> Any:
            if next(numbers) == fatal_call:
                if name == "pwrite":
                    fd, buffer, offset = args
                    operation(self, fd, buffer[: len(buffer) // 2 // PAGE * PAGE], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(self, *args)

        return call

    methods = {name: dying(name) for name in vars(FileSystem) if not name.startswith("_")}
    fs: FileSystem = type("Mortal", (FileSystem,), methods)()
    return fs


def open_checkpointer(job: Job, rank: int) -> shardckpt.Checkpointer:
    """A checkpointer as the job says; the victim's is one that kills it."""

    class Mortal(shardckpt.Checkpointer):
        @staticmethod
        def _open_store(root: str | os.PathLike[str]) -> Store:
            return LocalStore(root, mortal(job.fatal_call))

    world_size = dist.get_world_size()
    options = shardckpt.Options(
        timeout=job.timeout,
        stage="lazy" if job.stage == "lazy" else "eager",
        background="process" if job.background == "process" else "thread",
        host_memory_limit=CHUNK * world_size if job.ring else None,
        parity=f"xor:{world_size}" if job.parity and world_size > 1 else None,
    )
    kind = Mortal if rank == job.victim else shardckpt.Checkpointer
    return kind(job.root, keep_last=job.keep_last, keep_every=job.keep_every, options=options)


def run(job: Job, log: Log) -> int:
    """Resume, train and save; the exit status."""
    this = Rank(job, log)
    with open_checkpointer(job, this.rank) as ckpt:
        log("begin", pid=os.getpid())
        restored = ckpt.restore(this.state)
        first = 1
        if restored:
            if names := this.wrong(restored):
                log("wrong", step=restored.step, names=names)
                return WRONG
            first = restored.step + 1
        log("restored", step=first - 1, leg=restored.info.metadata["leg"] if restored else 0)
        # ranks of unequal speed
        pauses = random.Random(f"{job.seed}/{job.leg}/{this.rank}")
        for step in range(first, first + job.steps):
            time.sleep(pauses.uniform(0, 0.004))
            this.train(step)
            if step % job.every == 0:
                this.save(ckpt, step)
            this.report()
        ckpt.wait()
        this.report()
    log("end")
    return 0


def main(job: Job, environment: Mapping[str, str]) -> int:
    """Join the other ranks, as the environment of torchrun says where, and run."""
    os.environ.update(environment)
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)
    log = Log(job, int(os.environ["RANK"]))
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=job.timeout))
        return run(job, log)
    except (shardckpt.CoordinationError, shardckpt.BackgroundDied) as error:
        log("lost", error=type(error).__name__, message=str(error))
    except RuntimeError as error:
        # what gloo and its store say of peers that are gone
        log("lost", error=type(error).__name__, message=str(error))
    except Exception as error:
        log("crashed", error=type(error).__name__, message=str(error))
        raise
    return LOST


if __name__ == "__main__":
    os._exit(main(Job.from_json(Path(sys.argv[1]).read_text()), {}))
