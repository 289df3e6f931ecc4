# SPDX-License-Identifier: Apache-2.0
"""The same work as DCP does it: every rank's plan, made on rank 0's behalf, then one global plan and its metadata."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from math import prod
from time import perf_counter

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_load_plan
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from .launch import OnProgress, Progress
from .shapes import llama_parameters
from .spec import PlanSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerPlanning:
    """What planning costs DCP."""

    ranks: int
    """World size."""
    planning_s: float
    """Rank 0: the global plan of all ranks' plans, and collecting and pickling the metadata, in seconds."""
    metadata_bytes: int
    """Size of the metadata file."""
    reading_back_s: float
    """Unpickling it, in seconds."""
    one_rank_save_s: float
    """One rank's own plan of a save, in seconds."""
    one_rank_load_s: float
    """One rank's own plan of a load onto the same layout, in seconds."""


def plan_peer(report: OnProgress, job: tuple[PlanSpec, str]) -> PeerPlanning:
    """Plan for ``peer_ranks`` ranks; takes minutes for many."""
    spec, folder = job
    ranks = spec.peer_ranks
    plans: list[SavePlan] = []
    local_s = 0.0
    for rank in reversed(range(ranks)):
        report(Progress(ranks - rank, ranks, f"DCP: the plan of rank {rank}"))
        state = _make_state(spec.model, rank, ranks)
        begun = perf_counter()
        planner = DefaultSavePlanner()
        planner.set_up_planner(state, is_coordinator=rank == 0)
        plans.insert(0, planner.create_local_plan())
        local_s += perf_counter() - begun
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        begun = perf_counter()
        global_plans, metadata = planner.create_global_plan(plans)
        planned_s = perf_counter() - begun
        results = [[_written(item, rank) for item in plan.items] for rank, plan in enumerate(global_plans)]
        begun = perf_counter()
        FileSystemWriter(scratch).finish(metadata, results)
        planned_s += perf_counter() - begun
        nbytes = os.stat(os.path.join(scratch, ".metadata")).st_size
        begun = perf_counter()
        metadata = FileSystemReader(scratch).read_metadata()
        read_s = perf_counter() - begun
    begun = perf_counter()
    create_default_local_load_plan(state, metadata)
    load_s = perf_counter() - begun
    return PeerPlanning(
        ranks=ranks,
        planning_s=planned_s,
        metadata_bytes=nbytes,
        reading_back_s=read_s,
        one_rank_save_s=local_s / ranks,
        one_rank_load_s=load_s,
    )


def _make_state(model: str, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """The state dict of one rank, without memory, in a process group that only seems to have other ranks."""
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    state: dict[str, torch.Tensor] = {}
    for name, shape in llama_parameters(model):
        for key in (f"model.{name}", f"optimizer.state.{name}.exp_avg", f"optimizer.state.{name}.exp_avg_sq"):
            step = -(-shape[0] // ranks)
            rows = min(max(shape[0] - rank * step, 0), step)
            local = torch.empty((rows, *shape[1:]), device="meta")
            stride = tuple(prod(shape[at + 1 :]) for at in range(len(shape)))
            state[key] = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride)
        state[f"optimizer.state.{name}.step"] = torch.zeros(())
    return state


def _written(item: WriteItem, rank: int) -> WriteResult:
    """What a rank reports of an item when it has written it."""
    size = 4 * prod(item.tensor_data.chunk.sizes) if item.tensor_data is not None else 0
    info = _StorageInfo(relative_path=f"__{rank}_0.distcp", offset=1 << 20, length=size + 1024)
    return WriteResult(index=item.index, size_in_bytes=size, storage_data=info)
