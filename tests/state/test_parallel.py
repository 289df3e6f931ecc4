# SPDX-License-Identifier: Apache-2.0
"""Capture and load under every kind of parallelism, on real ranks: any to any, bit for bit."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed._shard.sharded_tensor.shard import Shard as LocalShard
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from shardckpt.errors import StateError, UnsupportedLeaf
from shardckpt.layout import BoxLayout, FlatLayout, MeshLayout, Replicated, StridedShard
from shardckpt.state import Captured, Flat, capture
from tests.ranks import RankPool
from tests.state.jobs import (
    Job,
    MakeOptimizer,
    RowScaled,
    adamw,
    load_and_capture,
    make,
    one_group,
    portable,
    seeded_net,
    train_and_capture,
)
from tests.state.memory import Memory, bits, gather, load

PLACES = [
    ("plain", 1),
    ("ddp", 2),
    ("fsdp2", 2),
    ("fsdp2", 3),
    ("hsdp", 4),
    ("tp", 2),
    ("fsdp2+tp", 4),
    ("zero", 2),
    ("zero", 3),
    ("fsdp1", 2),
    ("fsdp1", 3),
    ("fsdp1-orig", 3),
    ("fsdp1-none", 2),
    ("fsdp1-none-orig", 2),
    ("fsdp1-grad", 2),
    ("fsdp1-grad-orig", 2),
    ("fsdp1-hybrid", 4),
    ("fsdp1-hybrid-orig", 4),
]
QUICK = [("plain", 1), ("ddp", 2), ("fsdp2", 2), ("zero", 2)]
"""The others are slow, as most of them are slow to make."""
ADAMW: MakeOptimizer = functools.partial(one_group, torch.optim.AdamW)


def quick(places: list[tuple[str, int]]) -> list[Any]:
    """Parameters of a test, of which those that are not quick are marked as slow."""
    return [pytest.param(*place, id=str(place), marks=[] if place in QUICK else [pytest.mark.slow]) for place in places]


@functools.cache
def saved(ranks: RankPool, kind: str, size: int, optimizer: MakeOptimizer = ADAMW) -> Memory:
    return gather(ranks.run(size, train_and_capture, kind, 1, 2, optimizer))


def load_each(kind: str, memories: list[Memory], optimizer: MakeOptimizer) -> list[Captured]:
    """Load one after the other into jobs of their own, every second of which has trained before."""
    captured = []
    for number, memory in enumerate(memories):
        again, missing, unexpected = load_and_capture(kind, memory, number % 2, 0, optimizer)
        assert not missing and not unexpected
        captured.append(again)
    return captured


def reloaded(ranks: RankPool, kind: str, size: int, memories: list[Memory], optimizer: MakeOptimizer = ADAMW) -> list[Memory]:
    """What each is after a way through a job."""
    return [gather(list(captured)) for captured in zip(*ranks.run(size, load_each, kind, memories, optimizer), strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), PLACES, ids=str)
def test_what_every_kind_saves_loads_into_every_kind(ranks: RankPool, kind: str, size: int) -> None:
    memories = [saved(ranks, *source) for source in PLACES]
    for source, memory, again in zip(PLACES, memories, reloaded(ranks, kind, size, memories), strict=True):
        assert again.named() == memory.named(), source
        assert again.values == memory.values, source


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), quick([p for p in PLACES if not p[0].startswith("fsdp1") or "orig" in p[0]]))
def test_two_param_groups(ranks: RankPool, kind: str, size: int) -> None:
    memory = saved(ranks, kind, size, adamw)
    assert len({value for name, value in memory.values.items() if "group_of" in name}) == 2
    [again] = reloaded(ranks, kind, size, [memory], adamw)
    assert again.named() == memory.named()
    [plain] = reloaded(ranks, "plain", 1, [memory], adamw)
    assert plain.named() == memory.named() and plain.values == memory.values


@pytest.mark.parametrize(("kind", "size"), quick(PLACES))
def test_training_goes_on_as_if_it_had_not_stopped(ranks: RankPool, kind: str, size: int) -> None:
    memory = saved(ranks, kind, size)
    through = gather(ranks.run(size, train_and_capture, kind, 1, 4, ADAMW))
    outcomes = ranks.run(size, load_and_capture, kind, memory, 0, 2, ADAMW)
    assert gather([captured for captured, _, _ in outcomes]).named() == through.named()


ROWS: MakeOptimizer = functools.partial(one_group, RowScaled)
ADAFACTOR: MakeOptimizer = functools.partial(one_group, torch.optim.Adafactor)
SGD: MakeOptimizer = functools.partial(one_group, torch.optim.SGD)
MOMENTUM: MakeOptimizer = functools.partial(one_group, torch.optim.SGD, momentum=0.9)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [ROWS, SGD, MOMENTUM], ids=["rows", "sgd", "momentum"])
@pytest.mark.parametrize("source", [("ddp", 2), ("fsdp2", 3)], ids=str)
def test_other_optimizers(ranks: RankPool, source: tuple[str, int], optimizer: MakeOptimizer) -> None:
    memory = saved(ranks, *source, optimizer)
    for kind, size in [("plain", 1), ("fsdp2", 2), ("tp", 2), ("fsdp2+tp", 4), ("zero", 2)]:
        [again] = reloaded(ranks, kind, size, [memory], optimizer)
        assert again.named() == memory.named() and again.values == memory.values, (kind, size)


def load_error(kind: str, memory: Memory, optimizer: MakeOptimizer) -> str:
    try:
        load(memory, make(kind, 99, optimizer).state())
    except StateError as error:
        return error.message
    return ""


def test_adafactor(ranks: RankPool) -> None:
    memory = saved(ranks, "ddp", 2, ADAFACTOR)
    for kind, size in [("plain", 1), ("ddp", 3), ("zero", 2)]:
        [again] = reloaded(ranks, kind, size, [memory], ADAFACTOR)
        assert again.named() == memory.named()
    # torch's own step fails on parameters that are sharded by rows, so there is no such state to load into
    message = ranks.run(2, load_error, "fsdp2", memory, ADAFACTOR)[0]
    assert "_var'" in message and "Take one step before loading" in message


def captured_layouts(kind: str) -> dict[str, Any]:
    job = make(kind, 1, ADAMW)
    job.step()
    return {tensor.name: tensor.layout for tensor in capture(job.state()).tensors}


@pytest.mark.slow
def test_layouts_say_what_torch_says(ranks: RankPool) -> None:
    hsdp = ranks.run(4, captured_layouts, "hsdp")
    layout = hsdp[3]["model/blocks.0.up.weight"]
    assert isinstance(layout, MeshLayout) and layout.mesh.shape == (2, 2) and hsdp[0] == hsdp[3]
    both = ranks.run(4, captured_layouts, "fsdp2+tp")
    assert isinstance(both[0]["model/blocks.0.up.weight"].placements[0], StridedShard)
    # parameters that tensor parallelism leaves alone live on each data parallel submesh
    assert both[0]["model/embed.weight"].mesh.ranks == (0, 2) and both[1]["model/embed.weight"].mesh.ranks == (1, 3)
    plain = ranks.run(2, captured_layouts, "ddp")
    assert plain[1]["model/embed.weight"] == Replicated((7, 5))
    # DDP broadcasts buffers from its first rank, so only that one saves them
    assert plain[0].keys() - plain[1].keys() == {"model/scale"}


def test_each_zero_rank_lists_only_the_state_that_it_owns(ranks: RankPool) -> None:
    first, second = ranks.run(2, captured_layouts, "zero")
    state = [{name for name in side if name.startswith("optimizer/state")} for side in (first, second)]
    assert state[0] and state[1] and not state[0] & state[1]


def test_fsdp1_names_flat_ranges_of_all_ranks_and_shares_their_memory(ranks: RankPool) -> None:
    sides = ranks.run(3, captured_layouts, "fsdp1-orig")
    layouts = {name: layout for side in sides for name, layout in side.items() if name.startswith("model/blocks")}
    for layout in layouts.values():
        assert isinstance(layout, FlatLayout)
        assert layout.ranges[0][1] == 0 and layout.ranges[-1][2] == torch.Size(layout.shape).numel()
    for rank, side in enumerate(sides):
        assert all(rank in layout.ranks for name, layout in side.items() if name in layouts)


def fill_while_gathered(kind: str, memory: Memory) -> bool:
    """Load while parameters are gathered, as they are after a forward pass without resharding."""
    job = make(kind, 99, ADAMW)
    with torch.no_grad():
        job.model(torch.zeros(1, 2, dtype=torch.int64))
    load(memory, job.state())
    expected = seeded_net(1)
    expected.load_state_dict({name[6:]: t for name, t in memory.whole.items() if name.startswith("model/")}, strict=False)
    expected.head.weight = expected.embed.weight
    x = torch.arange(6).view(2, 3)
    return bool(torch.allclose(job.model(x), expected(x), atol=1e-6))


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1-grad", "fsdp1-grad-orig", "fsdp1", "fsdp1-orig"])
def test_loading_while_parameters_are_gathered(ranks: RankPool, kind: str) -> None:
    assert ranks.run(2, fill_while_gathered, kind, saved(ranks, "plain", 1)) == [True, True]


def load_after_meta(memory: Memory) -> Captured:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with torch.device("meta"):
        model = seeded_net(5)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = ADAMW(model)
    try:
        load(memory, {"model": model, "optimizer": optimizer})
    except StateError as error:
        assert "model.to_empty" in error.message
    else:
        raise AssertionError("a meta tensor was accepted")
    model.to_empty(device="cpu")
    job = Job(model, optimizer)
    load(memory, job.state())
    captured = portable(capture(job.state()))
    job.step()
    return captured


def test_meta_device_models(ranks: RankPool) -> None:
    memory = saved(ranks, "fsdp2", 2)
    again = gather(ranks.run(3, load_after_meta, memory))
    assert {k: v for k, v in again.named().items() if k.startswith("model")} == {
        k: v for k, v in memory.named().items() if k.startswith("model")
    }


class AppState:
    """What torch's own recipe for DCP looks like."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.job.model, self.job.optimizer)
        return {"model": model, "optim": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.job.model, self.job.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])


def app_round_trip(kind: str, memory: Memory | None) -> Captured:
    job = make(kind, 1 if memory is None else 99, ADAMW)
    if memory is None:
        job.step(2)
    else:
        load(memory, {"app": AppState(job)})
    return portable(capture({"app": AppState(job)}))


@pytest.mark.parametrize("source", [("ddp", 2), ("fsdp2", 2), ("fsdp1", 2)], ids=str)
@pytest.mark.parametrize("target", [("plain", 1), ("ddp", 2), ("fsdp2", 3), ("fsdp1", 2)], ids=str)
def test_objects_that_hold_sharded_state(ranks: RankPool, source: tuple[str, int], target: tuple[str, int]) -> None:
    memory = gather(ranks.run(source[1], app_round_trip, source[0], None))
    again = gather(ranks.run(target[1], app_round_trip, target[0], memory))
    assert again.named() == memory.named()


def batchnorm(step: bool) -> Captured:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    if step:
        model(torch.randn(4, 2) * (dist.get_rank() + 1)).sum().backward()
    return portable(capture({"model": model}))


def test_ddp_buffers_are_those_of_its_first_rank(ranks: RankPool) -> None:
    captured = ranks.run(2, batchnorm, True)
    names = [{tensor.name for tensor in side.tensors} for side in captured]
    assert names[0] - names[1] == {f"model/1.{key}" for key in ("running_mean", "running_var", "num_batches_tracked")}
    assert "model/1.running_mean" in gather(captured).whole


def different_stages() -> Captured:
    rank = dist.get_rank()
    torch.manual_seed(rank)
    own, shared = nn.Linear(2, 2), nn.Linear(2, 2)
    layers = nn.ModuleDict({f"layer{rank}": own, "shared": shared})
    with torch.no_grad():
        shared.weight.fill_(1.0)
        shared.bias.fill_(1.0)
    optimizer = torch.optim.AdamW(layers.parameters())
    own(torch.ones(1, 2)).sum().backward()
    for param in shared.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return portable(capture({"model": layers, "optimizer": optimizer}))


def test_ranks_with_different_parameters_do_not_collide(ranks: RankPool) -> None:
    memory = gather(ranks.run(3, different_stages))
    assert {name for name in memory.whole if "layer" in name and "model" in name} == {
        f"model/layer{rank}.{key}" for rank in range(3) for key in ("weight", "bias")
    }


def odd_placements() -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    messages = []
    wrong = DTensor.from_local(torch.ones(3, 2), mesh, [Shard(0)], run_check=False, shape=torch.Size((8, 2)), stride=(2, 1))
    for leaf in (DTensor.from_local(torch.ones(2), mesh, [Partial()]), wrong):
        try:
            capture({"a": {"t": leaf}})
        except StateError as error:
            messages.append(f"{type(error).__name__}: {error.message}")
    return messages


def test_placements_that_cannot_be_saved(ranks: RankPool) -> None:
    partial, wrong = ranks.run(2, odd_placements)[0]
    assert partial.startswith(UnsupportedLeaf.__name__) and "'a/t'" in partial and "redistribute" in partial
    assert wrong.startswith("StateError") and "rank 0 holds (4, 2) of (8, 2), but the local tensor is (3, 2)" in wrong


def from_a_part_of_the_ranks() -> list[str]:
    mesh = init_device_mesh("cpu", (3,))
    everywhere = distribute_tensor(torch.ones(4), mesh, [Replicate()])
    group = dist.new_group([0, 2])
    part: Any = (
        DTensor.from_local(torch.ones(2), DeviceMesh.from_group(group, "cpu"), [Shard(0)], run_check=False)
        if dist.get_rank() != 1
        else None
    )
    state = {"all": everywhere, "part": {} if part is None else {"t": part}}
    return [tensor.name for tensor in capture(state).tensors]


def test_tensors_on_a_part_of_the_ranks(ranks: RankPool) -> None:
    assert ranks.run(3, from_a_part_of_the_ranks) == [["all", "part/t"], ["all"], ["all", "part/t"]]


def flat_slices(memory: Memory | None) -> Any:
    """ZeRO-like slices of one tensor; rank 0 has none when there are more than two."""
    rank, size = dist.get_rank(), dist.get_world_size()
    numel = 35
    first = 0 if size == 2 else 1
    step = -(-numel // (size - first))
    start = max(rank - first, 0) * step if rank >= first else 0
    stop = min(start + step, numel) if rank >= first else 0
    whole = torch.arange(float(numel))
    data = whole[start:stop].clone() if memory is None else torch.zeros(stop - start)
    state = {"flat": Flat(data, (5, 7), start)}
    if memory is None:
        return portable(capture(state))
    load(memory, state)
    return bits(data) == bits(whole[start:stop])


def test_flat_slices(ranks: RankPool) -> None:
    memory = gather(ranks.run(3, flat_slices, None))
    assert ranks.run(2, flat_slices, memory) == [True, True]
    assert ranks.run(4, flat_slices, memory) == [True] * 4


def sharded_tensor() -> list[Any]:
    """A ShardedTensor of two of three ranks."""
    group = dist.new_group([1, 2])
    rank = dist.get_rank()
    if rank == 0:
        return []
    shard = LocalShard.from_tensor_and_offsets(torch.full((2, 3), float(rank)), [2 * (rank - 1), 0], rank)
    tensor = init_from_local_shards([shard], 4, 3, process_group=group)
    return [(t.name, t.layout) for t in capture({"t": tensor}).tensors]


def test_sharded_tensors_of_a_part_of_the_ranks(ranks: RankPool) -> None:
    layout = BoxLayout((4, 3), ((1, (0, 0), (2, 3)), (2, (2, 0), (2, 3))))
    assert ranks.run(3, sharded_tensor) == [[], [("t", layout)], [("t", layout)]]


def reduced_lately() -> list[float]:
    pending = funcol.all_reduce(torch.ones(2), "sum", list(range(dist.get_world_size())))
    [tensor] = capture({"t": pending}).tensors
    assert type(tensor.data) is torch.Tensor
    return tensor.data.tolist()


def test_tensors_that_a_collective_still_works_on_are_waited_for(ranks: RankPool) -> None:
    assert ranks.run(2, reduced_lately) == [[2.0, 2.0]] * 2
