# SPDX-License-Identifier: Apache-2.0
"""What optimizers own, on one rank and in parts, and which changes of it are seen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from shardckpt.guard import Owned, StepGuard, Versions, owned_by_optimizers
from shardckpt.state import PerRank, capture
from tests.engine.guarding import BATCH, FakePending, Net, Wrapper, backward
from tests.ranks import RankPool

# ---- what is owned


def owned_names(state: Mapping[str, Any]) -> set[str]:
    tensors = {leaf.name: leaf.data for leaf in capture(state).tensors}
    is_owned = owned_by_optimizers(state)
    return {name for name, tensor in tensors.items() if tensor.numel() and is_owned(tensor)}


def others(state: Mapping[str, Any]) -> set[str]:
    return {leaf.name for leaf in capture(state).tensors if leaf.data.numel()} - owned_names(state)


def a_trained_net(make: Callable[..., Any] = torch.optim.Adam, **options: Any) -> tuple[Net, Any]:
    net = Net()
    optimizer = make(net.parameters(), **options)
    backward(net)
    optimizer.step()
    return net, optimizer


BUFFERS = {"model/norm.running_mean", "model/norm.running_var", "model/norm.num_batches_tracked"}


def test_parameters_and_optimizer_state_are_owned_and_nothing_else() -> None:
    net, optimizer = a_trained_net(lr=torch.tensor(0.1), amsgrad=True)
    average = AveragedModel(net)
    state = {"model": net, "optimizer": optimizer, "ema": average, "tensor": torch.ones(3), "rank": PerRank(torch.ones(2))}
    assert {name for name in others(state) if not name.startswith(("ema/", "optimizer/param_groups/"))} == {
        *BUFFERS,
        "tensor",
        "rank",
    }
    assert not {name for name in owned_names(state) if name.startswith("ema/")}
    assert {"model/first.weight", "model/second.weight", "model/frozen"} <= owned_names(state)
    assert {f"optimizer/state/first.weight/{key}" for key in ("step", "exp_avg", "max_exp_avg_sq")} <= owned_names(state)


def test_state_in_lists_is_owned() -> None:
    # from some weights it comes no further than to its first direction
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        return backward(net)

    optimizer.step(closure)
    optimizer.step(closure)
    names = owned_names({"model": net, "optimizer": optimizer})
    assert any("old_dirs" in name for name in names)


def test_optimizers_are_found_wherever_they_stand() -> None:
    net, optimizer = a_trained_net()
    assert others({"model": net, "parts": {"a": [PerRank({"optimizer": optimizer})]}}) == BUFFERS
    assert others({"model": net, "optimizer": Wrapper(optimizer)}) == BUFFERS
    # a scheduler knows its optimizer
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert others({"model": net, "scheduler": scheduler}) == BUFFERS
    alone, both = ({"optimizer": optimizer}, {"optimizer": optimizer, "scheduler": scheduler})
    assert len(owned_by_optimizers(both).tensors) == len(owned_by_optimizers(alone).tensors)


def test_what_only_an_optimizer_elsewhere_owns_is_not() -> None:
    net, _ = a_trained_net()
    assert owned_names({"model": net}) == set()


def test_optimizers_without_hooks_own_nothing() -> None:
    net = Net()
    optimizer = a_trained_net()[1]
    alone = Wrapper(optimizer)
    del alone.optimizer
    alone.param_groups = [{"params": list(net.parameters()), "param_names": [name for name, _ in net.named_parameters()]}]
    assert not owned_by_optimizers({"model": net, "optimizer": alone}).tensors


def test_optimizers_that_leave_the_step_to_something_without_hooks_own_nothing() -> None:
    """As ZeroRedundancyOptimizer does when it steps in the backward pass of DDP."""
    net, optimizer = a_trained_net()
    optimizer.optim = object()
    assert not owned_by_optimizers({"model": net, "optimizer": optimizer}).tensors


def test_an_embedding_that_its_forward_pass_rescales_is_not_owned() -> None:
    net = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    assert others({"model": net, "optimizer": optimizer}) == {"model/0.weight"}


def test_tensors_of_inference_are_not_owned() -> None:
    with torch.inference_mode():
        tensor = torch.ones(3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    optimizer.state[optimizer.param_groups[0]["params"][0]] = {"x": tensor}
    is_owned = owned_by_optimizers({"optimizer": optimizer})
    assert not is_owned(tensor)
    assert is_owned(optimizer.param_groups[0]["params"][0])


def test_what_is_next_to_a_parameter_in_memory_is_not_owned() -> None:
    memory = torch.zeros(12)
    is_owned = Owned([memory[2:4], memory[4:8].view(2, 2).t(), memory[9::2]])
    assert is_owned(memory[2:8])
    assert is_owned(memory[3:7:2])
    for start, stop in ((1, 3), (7, 9), (8, 12), (9, 10), (0, 1)):
        assert not is_owned(memory[start:stop])
    assert not Owned()(memory)


# ---- what is seen as a change


def add_behind_the_counter(param: torch.Tensor) -> None:
    param.data.add_(1)


def write_through_numpy(param: torch.Tensor) -> None:
    param.detach().numpy()[...] += 1


@torch.no_grad()
def add_in_place(param: torch.Tensor) -> None:
    param.add_(1)


@torch.no_grad()
def change_one_element(param: torch.Tensor) -> None:
    param.view(-1)[1] += 1


def take_a_fused_step(param: torch.Tensor) -> None:
    param.grad = torch.ones_like(param)
    torch.optim.SGD([param], lr=0.1, fused=True).step()


def step_without_hooks(param: torch.Tensor) -> None:
    param.grad = torch.ones_like(param)
    optimizer = torch.optim.SGD([param], lr=0.1)
    step: Any = torch.optim.SGD.step
    step.__wrapped__(optimizer)


WRITES = [
    add_in_place,
    add_behind_the_counter,
    write_through_numpy,
    change_one_element,
    take_a_fused_step,
    step_without_hooks,
]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_change_is_found(write: Callable[[torch.Tensor], None]) -> None:
    net = Net()
    tensors = {leaf.name: leaf.data for leaf in capture({"model": net}).tensors}
    versions = Versions.of(tensors)
    assert versions.changed() == []
    write(net.first.weight)
    assert versions.changed() == ["model/first.weight", "model/second.weight"]


def test_training_up_to_the_step_changes_nothing_that_is_owned() -> None:
    net, optimizer = a_trained_net()
    state = {"model": net, "optimizer": optimizer}
    tensors = {leaf.name: leaf.data for leaf in capture(state).tensors}
    owned = owned_by_optimizers(state)
    late = Versions.of({name: tensor for name, tensor in tensors.items() if owned(tensor)}, owned.tensors)
    early = Versions.of(tensors)
    optimizer.zero_grad()
    backward(net)
    nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    net.eval()
    net(BATCH)
    assert late.changed() == []
    assert set(early.changed()) == BUFFERS
    # what a parameter was is still there when it is made to point elsewhere
    net.second.bias.data = torch.zeros(4)
    assert late.changed() == []


DTYPES = [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.complex128, torch.bool, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (40, 3)], ids=str)
def test_bytes_are_compared_whatever_they_are(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape).to(dtype)
    shapes = {"whole": tensor, "transposed": tensor.mT if len(shape) > 1 else tensor, "empty": tensor.reshape(-1)[:0]}
    versions = Versions.of(shapes)
    assert versions.changed() == []
    tensor.data.copy_(torch.ones(shape))
    assert versions.changed() == ["transposed", "whole"]


def test_nan_is_equal_to_itself() -> None:
    versions = Versions.of({"nan": torch.full((3,), torch.nan)})
    assert versions.changed() == []


def test_what_lies_between_the_elements_of_a_view_may_change() -> None:
    memory = torch.zeros(10, 4)
    versions = Versions.of({"column": memory[:, 0].detach()})
    memory.data[:, 1:] = 1
    assert versions.changed() == []
    memory.data[:, 0] = 1
    assert versions.changed() == ["column"]


def test_tensors_without_counters_are_told_by_their_bytes() -> None:
    with torch.inference_mode():
        tensor = torch.zeros(3)
        versions = Versions.of({"t": tensor})
        assert versions.changed() == []
        tensor.add_(1)
    assert versions.changed() == ["t"]


# ---- parameters in parts


def parallelize(net: nn.Module, kind: str) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if kind == "fsdp2":
        fully_shard(net)
    elif kind == "tp":
        parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    elif kind in ("ddp", "zero", "local sgd"):
        return DistributedDataParallel(net)
    elif kind.startswith("fsdp1"):
        strategy = ShardingStrategy.NO_SHARD if "whole" in kind else ShardingStrategy.FULL_SHARD
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(net, use_orig_params="orig" in kind, device_id=cpu, sharding_strategy=strategy)
    return net


def make_optimizer(net: nn.Module, kind: str) -> torch.optim.Optimizer:
    if kind == "zero":
        return ZeroRedundancyOptimizer(net.parameters(), torch.optim.Adam, lr=0.1)
    adam = torch.optim.Adam(net.parameters(), lr=0.1)
    if kind == "local sgd":
        return PostLocalSGDOptimizer(adam, PeriodicModelAverager(period=1))
    return adam


def check_parallel(kind: str) -> dict[str, Any]:
    torch.manual_seed(0)
    net = parallelize(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.BatchNorm1d(4)), kind)
    optimizer = make_optimizer(net, kind)
    state = {"model": net, "optimizer": optimizer}
    backward(net)
    optimizer.step()

    tensors = {leaf.name: leaf.data for leaf in capture(state).tensors}
    owned = owned_by_optimizers(state)
    late = {name: tensor for name, tensor in tensors.items() if tensor.numel() and owned(tensor)}
    versions = Versions.of(late, owned.tensors)
    before = copy.deepcopy(late)
    guard, pending = StepGuard(), FakePending(iter(late.values()))
    guard.watch(pending)
    optimizer.zero_grad()
    backward(net)
    unchanged = versions.changed()
    optimizer.step()
    stepped = {name for name, tensor in late.items() if not torch.equal(tensor, before[name])}
    guard.attach()
    guard.detach()
    return {
        "eager": sorted(name for name, tensor in tensors.items() if tensor.numel() and name not in late),
        "waited in time": pending.intact[0],
        "before the step": unchanged,
        "missed": sorted(stepped - set(versions.changed())),
        "stepped": len(stepped),
    }


KINDS = ["fsdp2", "tp", "ddp", "zero", "local sgd", "fsdp1", "fsdp1 orig", "fsdp1 whole", "fsdp1 whole orig"]


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_in_parts_are_guarded_as_whole_ones(ranks: RankPool, kind: str) -> None:
    for found in ranks.run(2, check_parallel, kind):
        assert {name.rpartition(".")[2] for name in found["eager"]} <= {"running_mean", "running_var", "num_batches_tracked"}
        assert found["waited in time"]
        assert found["before the step"] == []
        assert found["missed"] == []
        assert found["stepped"]
