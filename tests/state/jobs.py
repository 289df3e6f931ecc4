# SPDX-License-Identifier: Apache-2.0
"""A small training job under each kind of parallelism, for ranks of the test harness."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from shardckpt.state import Captured, RNGState, capture
from tests.state.memory import Memory, load


class Block(nn.Module):
    """Two layers that tensor parallelism can cut, and one that it leaves alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width + 1)
        self.down = nn.Linear(3 * width + 1, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


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
        self.register_buffer("scale", torch.tensor([0.5, 2.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h) * self.scale.sum()


@dataclasses.dataclass
class Job:
    """A model, its optimizer, and how to take a step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, count: int = 1) -> None:
        for at in range(count):
            self.optimizer.zero_grad()
            x = torch.arange(12).view(3, 4).add(at) % 7
            loss = nn.functional.cross_entropy(self.model(x).flatten(0, 1), (x.flatten() + 1) % 7)
            loss.backward()
            self.optimizer.step()

    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "step": 3, "rng": RNGState()}


MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups with different hyperparameters."""
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decay = [p for name, p in params if "norm" not in name]
    rest = [p for name, p in params if "norm" in name]
    return torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 2e-3}], lr=1e-2, foreach=False
    )


def one_group(kind: type[torch.optim.Optimizer], model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """All trained parameters in one group."""
    return kind((p for p in model.parameters() if p.requires_grad), lr=1e-2, foreach=False, **options)  # type: ignore[call-arg]


def seeded_net(seed: int, tied: bool = True) -> Net:
    """The model with weights that follow from ``seed``, the same on all ranks."""
    torch.manual_seed(seed)
    return Net(tied=tied)


def _tensor_parallel(model: nn.Module, mesh: Any) -> None:
    for block in model.blocks:  # type: ignore[union-attr]
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def _fully_shard(model: nn.Module, mesh: Any) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def make(kind: str, seed: int, optimizer: MakeOptimizer = adamw) -> Job:
    """The job under one kind of parallelism over all ranks."""
    size = dist.get_world_size()
    model: nn.Module = seeded_net(seed)
    if kind == "plain":
        pass
    elif kind in ("ddp", "zero"):
        model = DistributedDataParallel(model)
    elif kind == "fsdp2":
        _fully_shard(model, init_device_mesh("cpu", (size,)))
    elif kind == "hsdp":
        _fully_shard(model, init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard")))
    elif kind == "tp":
        _tensor_parallel(model, init_device_mesh("cpu", (size,)))
    elif kind == "fsdp2+tp":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
        _tensor_parallel(model, mesh["tp"])
        _fully_shard(model, mesh["dp"])
    elif kind.startswith("fsdp1"):
        model = _fsdp1(model, kind)
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
    return ZeroRedundancyOptimizer(groups, optimizer_class=type(template), **defaults)  # type: ignore[no-any-return]


def _fsdp1(model: nn.Module, kind: str) -> nn.Module:
    strategy = ShardingStrategy.FULL_SHARD
    group: Any = None
    if "hybrid" in kind:
        strategy = ShardingStrategy.HYBRID_SHARD
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
        return FullyShardedDataParallel(
            model,
            device_mesh=mesh,
            sharding_strategy=strategy,
            use_orig_params="orig" in kind,
            device_id=torch.device("cpu"),
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            ignored_states=[model.frozen],  # type: ignore[list-item]
        )
    if "none" in kind:
        strategy = ShardingStrategy.NO_SHARD
    if "grad" in kind:
        strategy = ShardingStrategy.SHARD_GRAD_OP
    return FullyShardedDataParallel(
        model,
        process_group=group,
        sharding_strategy=strategy,
        use_orig_params="orig" in kind,
        device_id=torch.device("cpu"),
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        ignored_states=[model.frozen],  # type: ignore[list-item]
    )


def portable(captured: Captured) -> Captured:
    """``captured`` with tensors that do not carry the memory around them along."""
    tensors = [dataclasses.replace(tensor, data=tensor.data.detach().clone()) for tensor in captured.tensors]
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
    target = load(memory, job.state())
    job.step(steps_after)
    return portable(capture(job.state())), target.missing, target.unexpected


MOMENTUM: MakeOptimizer = functools.partial(one_group, torch.optim.SGD, momentum=0.9)


def select(memory: Memory, *keys: str) -> Mapping[str, torch.Tensor]:
    """The whole tensors below the given keys."""
    return {name: tensor for name, tensor in memory.whole.items() if name.split("/")[0] in keys}
