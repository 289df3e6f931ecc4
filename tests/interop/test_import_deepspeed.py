# SPDX-License-Identifier: Apache-2.0
"""Directories that real DeepSpeed wrote: imported, and loaded straight into states, bit for bit what the engines held."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import shardckpt
from shardckpt.interop.deepspeed import import_deepspeed, load
from tests.cli.run import run
from tests.deepspeed.engines import (
    MATRIX_DECAY,
    adamw,
    make_engine,
    masters,
    moments,
    needs_deepspeed,
    param_groups,
    small_model,
    train,
)
from tests.ranks import RankPool

pytestmark = [needs_deepspeed, pytest.mark.slow]
WORLD = 3
VARIANTS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "1": (1, "fp32", {}),
    "2": (2, "bf16", {"round_robin_gradients": True}),
    "3": (3, "bf16", {"sub_group_size": 60}),
    "1-fp16": (1, "fp16", {}),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    """Processes of their own, which DeepSpeed may change."""
    with RankPool() as pool:
        yield pool


def write(place: str, variant: str) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    stage, dtype, zero = VARIANTS[variant]
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)
    engine = make_engine(stage, dtype, scheduler=schedule, **zero)
    train(engine, first=0, count=3)
    engine.save_checkpoint(place, tag="third", client_state={"epoch": 7, "rng": torch.arange(5, dtype=torch.uint8)})
    if "round_robin_gradients" in zero:
        return in_flat_order(engine)
    return masters(engine), moments(engine)


def in_flat_order(engine: Any) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """As `masters` and `moments`: with round_robin_gradients, DeepSpeed's own addresses of masters are of another order."""
    weights, states = {}, {}
    inner = engine.optimizer
    for params, flat in zip(inner.round_robin_bit16_groups, inner.single_partition_of_fp32_groups, strict=True):
        mine = {"fp32": flat.detach(), **inner.optimizer.state[flat]}
        parts: list[Any] = [None] * WORLD
        dist.all_gather_object(parts, {key: value for key, value in mine.items() if value.dim()})
        whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        at = 0
        for param in params:
            found = {key: value[at : at + param.numel()].view(param.shape) for key, value in whole.items()}
            assert torch.equal(found["fp32"].to(param.dtype), param)
            name = engine.param_names[param]
            weights[name] = found.pop("fp32")
            states[name] = found
            at += param.numel()
    return weights, states


@pytest.fixture(scope="module", params=list(VARIANTS))
def written(request: pytest.FixtureRequest, ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(directory, variant, masters, moments) of one short training."""
    place = tmp_path_factory.mktemp(f"stage{request.param}")
    found = ranks.run(WORLD, write, str(place), request.param, timeout=240)[0]
    return (place, request.param, *found)


def check(state: Any, variant: str, weights: dict[str, Tensor], states: dict[str, dict[str, Any]]) -> None:
    for name, value in weights.items():
        assert torch.equal(state["model"][name], value), name
        for key, moment in states[name].items():
            assert torch.equal(torch.as_tensor(state["optimizer"]["state"][name][key]), torch.as_tensor(moment)), (name, key)
    model = small_model()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[VARIANTS[variant][1]]
    frozen = state["model"]["frozen.weight"]
    assert torch.equal(frozen, model.frozen.weight.detach().to(dtype))
    assert torch.equal(state["model"]["scale"], model.scale.to(state["model"]["scale"].dtype))
    groups, owner = state["optimizer"]["param_groups"], state["optimizer"]["group_of"]
    assert groups[owner["up.weight"]]["weight_decay"] == MATRIX_DECAY
    assert groups[owner["norm.weight"]]["weight_decay"] == 0.0
    assert state["client_state"]["epoch"] == 7
    assert state["client_state"]["rng"].tolist() == [0, 1, 2, 3, 4]
    assert state["lr_scheduler"]["last_epoch"] == 3 - state["deepspeed"]["skipped_steps"]
    assert state["deepspeed"]["zero_stage"] == VARIANTS[variant][0]
    assert state["deepspeed"]["dtype"] == str(dtype).removeprefix("torch.")


def test_import_keeps_every_bit(written: Any, tmp_path: Path) -> None:
    place, variant, weights, states = written
    done = import_deepspeed(place, tmp_path / "root")
    assert (done.step, done.tag) == (3, "third")
    restored = shardckpt.load(tmp_path / "root")
    assert restored.info.metadata == {"deepspeed_tag": "third"}
    check(restored.state, variant, weights, states)
    assert restored.state["model"]["head.weight"] is restored.state["model"]["embed.weight"]


def test_load_without_a_target_is_the_same(written: Any) -> None:
    place, variant, weights, states = written
    restored = load(place)
    assert restored.step == 3
    check(restored.state, variant, weights, states)


def load_sharded(place: str, count: int) -> tuple[dict[str, Tensor], dict[str, Any], int, int]:
    model = small_model(seed=5)
    fully_shard(model, mesh=init_device_mesh("cpu", (count,)))
    optimizer = adamw(param_groups(model))
    restored = load(place, {"model": model, "optimizer": optimizer}, strict=True, convert_dtype=True)
    full = {name: param.full_tensor().detach() for name, param in model.named_parameters()}  # type: ignore[attr-defined]
    moments_of = {n: optimizer.state[p]["exp_avg"].full_tensor() for n, p in model.named_parameters() if p.requires_grad}
    return full, moments_of, restored.info.bytes_read, restored.info.bytes_needed


def test_fsdp2_is_filled_on_another_world_size(written: Any, ranks: RankPool) -> None:
    place, _, weights, states = written
    full, moments_of, _, needed = ranks.run(2, load_sharded, str(place), 2, timeout=120)[0]
    assert needed > 0
    for name, value in weights.items():
        assert torch.equal(full[name], value)
        assert torch.equal(moments_of[name], states[name]["exp_avg"])


def test_the_command_imports_and_refuses_what_is_not_whole(written: Any, tmp_path: Path) -> None:
    place, variant, _, _ = written
    stage = VARIANTS[variant][0]
    dry = run("import", "deepspeed", place, tmp_path / "root", "--dry-run", "--json")
    assert dry.status == 0
    assert not (tmp_path / "root").exists()
    assert run("import", "deepspeed", place, tmp_path / "root").status == 0
    assert run("verify", tmp_path / "root").status == 0
    again = run("import", "deepspeed", place, tmp_path / "root")
    assert again.status == 1
    copy = tmp_path / "copy"
    shutil.copytree(place, copy)
    last = sorted((copy / "third").glob("*_optim_states.pt"))[-1]
    whole = last.read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        last.write_bytes(whole[:size])
        with pytest.raises(
            (shardckpt.TruncatedFile, shardckpt.InvalidForeignCheckpoint, shardckpt.UnsupportedForeignCheckpoint)
        ):
            import_deepspeed(copy, tmp_path / "other")
    last.unlink()
    with pytest.raises((shardckpt.InvalidForeignCheckpoint, shardckpt.MissingFile)):
        import_deepspeed(copy, tmp_path / "other", tag="third")
    assert not (tmp_path / "other").exists()
    assert stage in (1, 2, 3)
