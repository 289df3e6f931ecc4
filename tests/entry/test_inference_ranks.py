# SPDX-License-Identifier: Apache-2.0
"""`load_for_inference` on real ranks: from every kind of training, into plain and tensor-parallel models, and what is read."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardckpt
from shardckpt import InferenceConfig
from shardckpt.validate import parse_manifest
from tests.models import KINDS, Net, make_job, named, parallelize, param_groups, shard, tensor_parallel, whole
from tests.ranks import RankPool

Tensors = dict[str, torch.Tensor]
WIDTH, HIDDEN = 192, 3072
X = torch.arange(10).view(2, 5)


def save_job(root: str, kind: str) -> Tensors:
    """Train under a kind of parallelism, and save all of it; what the weights are."""
    if kind == "fsdp1":
        torch.manual_seed(3)
        model = FullyShardedDataParallel(Net(), use_orig_params=True, device_id=torch.device("cpu"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        model(X).sum().backward()
        optimizer.step()
        shardckpt.save(root, {"model": model, "optimizer": optimizer})
        with FullyShardedDataParallel.summon_full_params(model):
            return {name: tensor.detach().clone() for name, tensor in model.module.state_dict().items()}
    job = make_job(kind, seed=3)
    job.train(2)
    shardckpt.save(root, job.state())
    return {name: whole(tensor) for name, tensor in named(job.model)}


def built(seed: int, device: str, width: int = 6, hidden: int = 24) -> Net:
    torch.manual_seed(seed)
    with torch.device(device):
        return Net(width, hidden)


def plan() -> dict[str, Any]:
    return {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}


def load_as(root: str, how: str, expected: Tensors, dtype: torch.dtype | None) -> tuple[list[str], int]:
    """Names that differ after a load, and the number of tensors that are cut up; checks that the model computes the same."""
    device, _, how = how.rpartition("-")
    model = built(50 + dist.get_rank() if not how else 50, device or "cpu")
    config = InferenceConfig(dtype=dtype)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if how == "made":
        config = InferenceConfig(dtype=dtype, mesh=mesh, plan=plan())
    elif how == "parallel":
        tensor_parallel(model, mesh)
    shardckpt.load_for_inference(root, model, config)
    expected = {n: t.to(dtype) if dtype is not None and t.is_floating_point() else t for n, t in expected.items()}
    if dtype is None:
        reference = built(1, "cpu")
        reference.load_state_dict(expected)
        assert torch.allclose(model(X), reference.eval()(X), atol=1e-4)
        model.calls -= 1
    found = {name: whole(tensor) for name, tensor in named(model)}
    cut = [name for name, param in model.named_parameters() if isinstance(param, DTensor)]
    assert model.head.weight is model.embed.weight
    return sorted(n for n in expected if not torch.equal(found[n], expected[n]) or found[n].dtype != expected[n].dtype), len(
        cut
    )


@pytest.mark.parametrize("kind", [*KINDS, "fsdp1"])
def test_every_kind_of_training_goes_into_a_model_of_one_process(ranks: RankPool, tmp_path: Path, kind: str) -> None:
    expected = ranks.run(2, save_job, str(tmp_path / "c"), kind, timeout=120)[0]
    for device in ("cpu", "meta"):
        model = built(50, device)
        restored = shardckpt.load_for_inference(tmp_path / "c", model)
        assert restored.info.world_size == 2
        found = dict(named(model))
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), [("fsdp2", 2), ("ddp", 4), ("tp", 3)])
def test_into_tensor_parallel_models(ranks: RankPool, tmp_path: Path, kind: str, size: int) -> None:
    expected = ranks.run(2, save_job, str(tmp_path / "c"), kind, timeout=120)[0]
    for how, cut in (("cpu-made", 6), ("meta-made", 6), ("meta-parallel", 6), ("meta-plain", 0)):
        for dtype in (None, torch.bfloat16):
            outcomes = ranks.run(size, load_as, str(tmp_path / "c"), how, expected, dtype, timeout=120)
            assert outcomes == [([], cut)] * size, how


# ---- what is read


def save_wide(root: str) -> None:
    torch.manual_seed(3)
    model = Net(WIDTH, HIDDEN)
    shard(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(param_groups(model), lr=0.01)
    model(X).sum().backward()
    optimizer.step()
    shardckpt.save(root, {"model": model, "optimizer": optimizer, "rng": shardckpt.RNGState()})


def spoil_all_but_the_model(place: Path) -> tuple[int, int]:
    """Put noise into every digest block that has nothing of the model; bytes of blocks that have, and bytes of all blocks."""
    checkpoint = parse_manifest((place / "manifest.json").read_bytes())
    block, noise = checkpoint.plan.block_size, random.Random(1)
    needed, total = 0, 0
    for rank, record in enumerate(checkpoint.manifest.files):
        data = bytearray((place / record.name).read_bytes())
        size = len(data) - record.data
        pieces = [p for p in checkpoint.plan.file_pieces(rank) if p.tensor.name.startswith("model/")]
        total += size
        for start in range(0, size, block):
            stop = min(start + block, size)
            if any(piece.offset < stop and piece.offset + piece.nbytes > start for piece in pieces):
                needed += stop - start
            else:
                data[record.data + start : record.data + stop] = noise.randbytes(stop - start)
        (place / record.name).write_bytes(data)
    return needed, total


def read_wide(root: str, how: str) -> tuple[int, int, int]:
    """Bytes that this rank holds, and bytes needed and read by all."""
    model = built(1, "meta", WIDTH, HIDDEN)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    config = InferenceConfig(mesh=mesh, plan=plan()) if how == "parallel" else InferenceConfig()
    info = shardckpt.load_for_inference(root, model, config).info
    parts = [t.to_local() if isinstance(t, DTensor) else t for t in (*model.parameters(), *model.buffers())]
    return sum(part.numel() * part.element_size() for part in parts), info.bytes_needed, info.bytes_read


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain", "parallel"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_bytes_read_are_those_of_the_model(ranks: RankPool, tmp_path: Path, size: int, how: str) -> None:
    ranks.run(3, save_wide, str(tmp_path), timeout=120)
    blocks, total = spoil_all_but_the_model(tmp_path)
    found = ranks.run(size, read_wide, str(tmp_path), how, timeout=120)
    held = [one for one, _, _ in found]
    model_bytes = sum(t.numel() * t.element_size() for t in (*built(1, "cpu", WIDTH, HIDDEN).state_dict().values(),))
    model_bytes -= WIDTH * 11 * 4  # the head is the embedding
    assert {(needed, read) for _, needed, read in found} == {(sum(held), found[0][2])}
    assert blocks <= 1.05 * model_bytes
    assert total > 2.9 * model_bytes
    if how == "plain":
        assert held == [model_bytes] * size
        assert found[0][2] == size * blocks
    else:
        # rows of one matrix and columns of the other: every block is read once, and passed on
        assert sum(held) <= 1.05 * model_bytes
        assert found[0][2] == blocks


# ---- under FSDP


def load_under_fsdp(root: str, kind: str, expected: Tensors) -> list[str]:
    model: Any
    torch.manual_seed(50)
    if kind == "fsdp1":
        model = FullyShardedDataParallel(Net(), use_orig_params=True, device_id=torch.device("cpu"))
    else:
        model, _ = parallelize(Net(), kind)
    for config in (InferenceConfig(dtype=torch.bfloat16), InferenceConfig(device="cuda")):
        with pytest.raises(shardckpt.ConfigError, match=r"a model under FSDP is filled as it is|leave device out"):
            shardckpt.load_for_inference(root, model, config)
    shardckpt.load_for_inference(root, model)
    assert not model.training
    if kind == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(model):
            found = {name: tensor.detach().clone() for name, tensor in model.module.state_dict().items()}
    else:
        found = {name: whole(tensor) for name, tensor in named(model)}
    return [name for name in expected if not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_a_model_under_fsdp_is_filled_as_it_is(ranks: RankPool, tmp_path: Path, kind: str) -> None:
    expected = ranks.run(2, save_job, str(tmp_path), "ddp", timeout=120)[0]
    assert ranks.run(3, load_under_fsdp, str(tmp_path), kind, expected, timeout=120) == [[], [], []]


def make_configs() -> None:
    square = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    with pytest.raises(shardckpt.ConfigError, match="is no DeviceMesh of one dimension"):
        InferenceConfig(mesh=square, plan=plan())
    with pytest.raises(shardckpt.ConfigError, match="mesh and plan go together"):
        InferenceConfig(mesh=square["tp"])
    with pytest.raises(shardckpt.ConfigError, match="device='cuda' and a mesh of cpu devices do not fit"):
        InferenceConfig(mesh=square["tp"], plan=plan(), device="cuda")
    model = nn.Sequential(nn.Linear(4, 4))
    InferenceConfig(mesh=square["tp"], plan=ColwiseParallel(), device="cpu")
    assert not isinstance(model[0].weight, DTensor)


def test_meshes_that_do_not_fit_are_refused(ranks: RankPool) -> None:
    ranks.run(2, make_configs, timeout=120)
