# SPDX-License-Identifier: Apache-2.0
"""A small training job under each kind of parallelism, and its whole state without the help of the engine."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import shardckpt
from tests.ranks import CannotRun

KINDS = ("ddp", "fsdp2", "hsdp", "tp", "fsdp2+tp", "zero")
WORLD_SIZES = (1, 2, 3, 4, 8)
HYBRID = {1: (1, 1), 2: (2, 1), 3: (1, 3), 4: (2, 2), 8: (2, 4)}
"""(replicas, shards) of HSDP by world size."""
TWO_D = {1: (1, 1), 2: (1, 2), 3: (3, 1), 4: (2, 2), 8: (4, 2)}
"""(data-parallel, tensor-parallel) ranks by world size."""
VOCABULARY = 11
FSDP2_ON_CPUS = (2, 8)
"""Releases of torch before lack streams of CPUs (2.6), or average gradients in a way that gloo does not know (2.7)."""


class Block(nn.Module):
    """Two layers that tensor parallelism cuts, and a norm that it leaves alone."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(torch.relu(self.up(self.norm(x)))))


class Net(nn.Module):
    """Sizes that do not divide evenly, tied weights, a frozen parameter, buffers of two dtypes."""

    def __init__(self, width: int = 6, hidden: int = 24, *, extra: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList([Block(width, hidden), Block(width, hidden)])
        self.frozen = nn.Parameter(torch.randn(5, 3), requires_grad=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        if extra:
            self.extra = nn.Linear(width, width)
        self.calls: torch.Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.tensor([0.5, 1.5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        logits: torch.Tensor = self.head(h)
        return logits * self.scale.sum()


@dataclass
class Job:
    """A model, what trains it, and what else there is to remember."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    data_rank: int
    """Ranks with the same one see the same data."""
    progress: dict[str, Any] = field(default_factory=lambda: {"steps": 0, "seen": [], "mean": torch.zeros(3)})

    @property
    def local_optimizer(self) -> torch.optim.Optimizer:
        """The one that holds the state on this rank."""
        return self.optimizer.optim if isinstance(self.optimizer, ZeroRedundancyOptimizer) else self.optimizer

    def state(self) -> dict[str, Any]:
        """What is saved."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "rng": shardckpt.RNGState(),
            "progress": self.progress,
        }

    def train(self, steps: int) -> float:
        """Take steps; the last loss of this rank."""
        loss = torch.tensor(0.0)
        for _ in range(steps):
            step = self.progress["steps"]
            generator = torch.Generator().manual_seed(1000 * step + self.data_rank)
            x = torch.randint(VOCABULARY, (4, 5), generator=generator)
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(x).flatten(0, 1), (x.flatten() + 1) % VOCABULARY)
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.progress["steps"] = step + 1
            self.progress["seen"].append(step)
            self.progress["mean"] += 0.1
        return loss.item()

    @torch.no_grad()
    def spoil(self) -> None:
        """Make everything differ from what it was, as training would, at a fraction of the cost."""
        states = [entry for state in self.local_optimizer.state.values() for entry in state.values()]
        for tensor in [*(tensor for _, tensor in named(self.model)), *states]:
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).add_(1)
        for group in self.optimizer.param_groups:
            group["lr"] *= 2
        self.scheduler.last_epoch += 1
        torch.rand(())
        self.progress["steps"] += 1
        self.progress["seen"].append(-1)
        self.progress["mean"] += 1


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups with different hyperparameters; what is frozen is in none."""
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    return [
        {"params": [param for name, param in named if "norm" not in name], "weight_decay": 0.1},
        {"params": [param for name, param in named if "norm" in name], "weight_decay": 0.0, "lr": 2e-2},
    ]


def tensor_parallel(model: nn.Module, mesh: Any) -> None:
    """Cut the large layers of each block over ``mesh``."""
    for block in model.blocks:  # type: ignore[union-attr]
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def require_fsdp2() -> None:
    """On a rank: skip the test where FSDP2 does not train on CPUs."""
    release = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if release < FSDP2_ON_CPUS:
        raise CannotRun(f"FSDP2 of torch {torch.__version__} does not train on CPUs")


def shard(model: nn.Module, mesh: Any) -> None:
    """FSDP2, block by block."""
    require_fsdp2()
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def parallelize(model: nn.Module, kind: str) -> tuple[nn.Module, int]:
    """The model under a kind of parallelism over all ranks, and which data this rank sees."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if kind in ("ddp", "zero"):
        # DDP reorders gradients after its first step, except so; sums over three ranks and more then round otherwise
        return DistributedDataParallel(model, find_unused_parameters=True), rank
    if kind == "fsdp2":
        shard(model, init_device_mesh("cpu", (size,)))
    elif kind == "hsdp":
        shard(model, init_device_mesh("cpu", HYBRID[size], mesh_dim_names=("replicate", "shard")))
    elif kind == "tp":
        tensor_parallel(model, init_device_mesh("cpu", (size,)))
        return model, 0
    elif kind == "fsdp2+tp":
        mesh = init_device_mesh("cpu", TWO_D[size], mesh_dim_names=("dp", "tp"))
        if TWO_D[size][1] > 1:
            tensor_parallel(model, mesh["tp"])
        shard(model, mesh["dp"])
        return model, rank // TWO_D[size][1]
    else:
        raise ValueError(kind)
    return model, rank


def make_job(kind: str, seed: int = 0) -> Job:
    """A job whose weights follow from ``seed``, and its random numbers from the seed and the data that this rank sees."""
    torch.manual_seed(seed)
    model, data_rank = parallelize(Net(), kind)
    if kind == "zero":
        optimizer: torch.optim.Optimizer = ZeroRedundancyOptimizer(
            param_groups(model), optimizer_class=torch.optim.AdamW, lr=1e-2, foreach=False
        )
    else:
        optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2, foreach=False)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    torch.manual_seed(seed + 77 + data_rank)
    return Job(model, optimizer, scheduler, data_rank)


# ---- the whole state, gathered by torch


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, on every rank; collective."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def named(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by plain name."""
    inner = module.module if isinstance(module, DistributedDataParallel) else module
    yield from inner.named_parameters(remove_duplicate=False)
    yield from inner.named_buffers()


def snapshot(job: Job, *, with_rng: bool = False) -> dict[str, Any]:
    """Everything in a job as plain tensors and values by name; collective."""
    found: dict[str, Any] = {f"model.{name}": whole(tensor) for name, tensor in named(job.model)}
    local = job.local_optimizer
    states: dict[str, Any] = {}
    names = {id(param): name for name, param in reversed(list(named(job.model)))}
    for group in job.optimizer.param_groups:
        for param in group["params"]:
            name = names[id(param)]
            for key, entry in local.state.get(param, {}).items():
                states[f"state.{name}.{key}"] = whole(entry)
            for key in ("lr", "initial_lr", "weight_decay", "betas", "eps", "foreach"):
                found[f"group.{name}.{key}"] = group[key]
    if local is not job.optimizer:
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, states)
        states = functools.reduce(dict.__or__, parts)
    found |= states
    found |= {f"scheduler.{key}": value for key, value in job.scheduler.state_dict().items()}
    found |= {f"progress.{key}": value for key, value in job.progress.items()}
    if with_rng:
        found["rng"] = torch.get_rng_state()
    return found


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names in which two snapshots are not equal bit for bit."""
    differing = sorted(found.keys() ^ expected.keys())
    for name in sorted(found.keys() & expected.keys()):
        a, b = found[name], expected[name]
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            same = (a.dtype, a.shape) == (b.dtype, b.shape) and a.numpy().tobytes() == b.numpy().tobytes()
        else:
            same = type(a) is type(b) and a == b
        if not same:
            differing.append(f"{name}: {a!r} != {b!r}"[:200])
    return differing
