# SPDX-License-Identifier: Apache-2.0
"""A small training job under each kind of parallelism, for ranks of the test harness."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import msgspec
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from shardckpt.state import Captured, RNGState, capture
from tests.models import require_fsdp2
from tests.state.memory import Memory, load


class Block(nn.Module):
    """Two layers that tensor parallelism can cut, and one that it leaves alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width + 1)
        self.down = nn.Linear(3 * width + 1, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", x + self.down(torch.relu(self.up(self.norm(x)))))


class Net(nn.Module):
    """Odd sizes, so that shards are uneven and some are empty; tied weights; a buffer; a frozen parameter."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.blocks = nn.ModuleList([Block(5), Block(5)])
        self.frozen = nn.Parameter(torch.randn(3, 2), requires_grad=False)
        self.head = nn.Linear(5, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.tensor([0.5, 2.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return cast("torch.Tensor", self.head(h) * self.scale.sum())


@dataclasses.dataclass
class Job:
    """A model, its optimizer, and how to take a step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    taken: int = 0

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.taken += 1
            self.optimizer.zero_grad()
            x = torch.arange(12).view(3, 4).add(self.taken) % 7
            loss = nn.functional.cross_entropy(self.model(x).flatten(0, 1), (x.flatten() + 1) % 7)
            loss.backward()
            self.optimizer.step()

    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "taken": self.taken, "rng": RNGState()}


MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups with different hyperparameters."""
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decay = [p for name, p in params if "norm" not in name]
    rest = [p for name, p in params if "norm" in name]
    return torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 2e-3}], lr=1e-2, foreach=False
    )


class RowScaled(torch.optim.Optimizer):
    """Has state of other shapes than its parameters: a number per row, and one per parameter."""

    def __init__(self, params: Any, lr: float = 1e-2, foreach: bool = False) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                rows = param.grad.abs().sum(dim=-1)
                if isinstance(rows, DTensor):
                    reduced = [Replicate() if placement.is_partial() else placement for placement in rows.placements]
                    rows = rows.redistribute(placements=reduced)
                state["rows"] = state["rows"] + rows if "rows" in state else rows
                state.setdefault("count", torch.zeros((), device=param.device)).add_(1)
                param.add_(param.grad, alpha=-group["lr"])


def one_group(kind: Any, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """All trained parameters in one group."""
    return kind((p for p in model.parameters() if p.requires_grad), lr=1e-2, foreach=False, **options)


def seeded_net(seed: int, tied: bool = True) -> Net:
    """The model with weights that follow from ``seed``, the same on all ranks."""
    torch.manual_seed(seed)
    return Net(tied=tied)


def _tensor_parallel(model: Net, mesh: Any) -> None:
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def _fully_shard(model: Net, mesh: Any) -> nn.Module:
    require_fsdp2()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def make(kind: str, seed: int, optimizer: MakeOptimizer = adamw) -> Job:
    """The job under one kind of parallelism over all ranks."""
    size = dist.get_world_size()
    net = seeded_net(seed)
    model: nn.Module = net
    if kind == "plain":
        pass
    elif kind in ("ddp", "zero"):
        model = DistributedDataParallel(net)
    elif kind == "fsdp2":
        _fully_shard(net, init_device_mesh("cpu", (size,)))
    elif kind == "hsdp":
        _fully_shard(net, init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard")))
    elif kind == "tp":
        _tensor_parallel(net, init_device_mesh("cpu", (size,)))
    elif kind == "fsdp2+tp":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
        _tensor_parallel(net, mesh["tp"])
        _fully_shard(net, mesh["dp"])
    elif kind.startswith("fsdp1"):
        model = _fsdp1(net, kind)
    else:
        raise ValueError(kind)
    if kind == "zero":
        return Job(model, _zero(model, optimizer))
    return Job(model, optimizer(model))


def _zero(model: nn.Module, optimizer: MakeOptimizer) -> torch.optim.Optimizer:
    template = optimizer(model)
    defaults = {key: value for key, value in template.defaults.items() if key in ("lr", "foreach", "momentum")}
    groups = [
        {key: value for key, value in group.items() if key in ("params", "lr", "weight_decay")}
        for group in template.param_groups
    ]
    return ZeroRedundancyOptimizer(groups, optimizer_class=type(template), **defaults)


def _fsdp1(model: Net, kind: str) -> nn.Module:
    strategies = {
        "none": ShardingStrategy.NO_SHARD,
        "grad": ShardingStrategy.SHARD_GRAD_OP,
        "hybrid": ShardingStrategy.HYBRID_SHARD,
    }
    found = [strategy for name, strategy in strategies.items() if name in kind]
    shape = (2, dist.get_world_size() // 2)
    return FullyShardedDataParallel(
        model,
        device_mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")) if "hybrid" in kind else None,
        sharding_strategy=found[0] if found else ShardingStrategy.FULL_SHARD,
        use_orig_params="orig" in kind,
        device_id=torch.device("cpu"),
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        ignored_states=[model.frozen],
    )


def portable(captured: Captured) -> Captured:
    """``captured`` with tensors that do not carry the memory around them along."""
    tensors = [msgspec.structs.replace(tensor, data=tensor.data.detach().clone()) for tensor in captured.tensors]
    return dataclasses.replace(captured, tensors=tensors)


def train_and_capture(kind: str, seed: int, steps: int, optimizer: MakeOptimizer = adamw) -> Captured:
    """What this rank captures after some steps."""
    job = make(kind, seed, optimizer)
    job.step(steps)
    return portable(capture(job.state()))


def load_and_capture(
    kind: str, memory: Memory, steps_before: int, steps_after: int = 0, optimizer: MakeOptimizer = adamw
) -> tuple[Captured, list[str], list[str]]:
    """Load into another job, perhaps one that has trained already; what it captures then, and missing and unexpected names."""
    job = make(kind, 99, optimizer)
    job.step(steps_before)
    state = job.state()
    target = load(memory, state)
    job.taken = state["taken"]
    job.step(steps_after)
    return portable(capture(job.state())), target.missing, target.unexpected
