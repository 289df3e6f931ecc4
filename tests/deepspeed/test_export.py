# SPDX-License-Identifier: Apache-2.0
"""Directories that are exported, and that DeepSpeed itself resumes from: from plain training, and from its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import shardckpt
from shardckpt.integrations.deepspeed import attach
from shardckpt.interop.export.deepspeed import export_deepspeed
from shardckpt.maintain.stored import open_checkpoint
from shardckpt.store import open_store
from tests.deepspeed.engines import (
    MATRIX_DECAY,
    adamw,
    computed_with,
    group_values,
    make_engine,
    masters,
    moments,
    needs_deepspeed,
    param_groups,
    small_model,
    torch_optimizer,
    train,
)
from tests.ranks import RankPool

pytestmark = [needs_deepspeed, pytest.mark.slow]

Known = tuple[dict[str, Tensor], dict[str, dict[str, Any]]]
BUFFER = torch.linspace(2.0, 3.0, 7)
FROZEN = torch.linspace(-1.0, 1.0, 49).view(7, 7)


def cosine(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)


def assert_holds(engine: Any, wanted: Known) -> None:
    """The engine's masters and moments are these, bit for bit."""
    weights, states = masters(engine), moments(engine)
    assert weights.keys() == wanted[0].keys() and states.keys() == wanted[1].keys()
    for name, weight in weights.items():
        assert torch.equal(weight, wanted[0][name].view(weight.shape)), name
        assert states[name].keys() == wanted[1][name].keys()
        for key, value in states[name].items():
            known = wanted[1][name][key]
            if torch.is_tensor(value):
                assert torch.equal(value, known.view(value.shape)), name
            else:
                assert value == float(known), (name, key)


def assert_holds_in_flat_order(engine: Any, wanted: Known) -> None:
    """As `assert_holds`: with round_robin_gradients, DeepSpeed's own record of where parameters lie is of another order."""
    optimizer = engine.optimizer
    for params, flat in zip(optimizer.round_robin_bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        names = [engine.param_names[param] for param in params]
        state = optimizer.optimizer.state[flat]
        assert all(state["step"] == wanted[1][name]["step"] for name in names)
        expected = {"": [wanted[0][name] for name in names]}
        expected |= {key: [wanted[1][name][key] for name in names] for key in ("exp_avg", "exp_avg_sq")}
        for key, tensors in expected.items():
            parts = [torch.empty_like(flat.data) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, state[key] if key else flat.data)
            ravel = torch.cat([tensor.flatten() for tensor in tensors])
            assert torch.equal(torch.cat(parts)[: ravel.numel()], ravel), (key, names)


def load_at(directory: str, stage: int, wanted: Known, dtype: str, **zero: Any) -> dict[str, Any]:
    """An engine at ``stage`` resumes and goes on; what it has from the checkpoint beside its tensors."""
    engine = make_engine(stage, dtype, seed=5, scheduler=cosine, **zero)
    path, client_state = engine.load_checkpoint(directory)
    assert path is not None
    assert_same = assert_holds_in_flat_order if "round_robin_gradients" in zero else assert_holds
    assert_same(engine, wanted)
    for name, param in computed_with(engine).items():
        if name in wanted[0]:
            assert torch.equal(param, wanted[0][name].to(param.dtype).view(param.shape)), name
        elif name == "frozen.weight":
            assert torch.equal(param, FROZEN.to(param.dtype)), name
    assert torch.equal(engine.module.scale, BUFFER.to(engine.module.scale.dtype))
    found = {
        "global_steps": engine.global_steps,
        "weight_decay": group_values(engine, "weight_decay"),
        "lr": group_values(engine, "lr"),
        "schedule": engine.lr_scheduler.last_epoch,
        "client": client_state.get("epoch"),
        "scale": engine.optimizer.loss_scaler.cur_scale,
        "optimizer": type(torch_optimizer(engine)).__name__,
    }
    assert all(torch.isfinite(torch.tensor(loss)) for loss in train(engine, first=20, count=2))
    return found


def load_all(root: str, cases: dict[str, tuple[int, dict[str, Any]]], wanted: Known, dtype: str) -> dict[str, dict[str, Any]]:
    return {name: load_at(f"{root}/{name}", stage, wanted, dtype, **zero) for name, (stage, zero) in cases.items()}


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "two": (2, {}),
    "robin": (2, {"round_robin_gradients": True}),
    "three": (3, {}),
    "pieces": (3, {"sub_group_size": 30}),
}


def export_cases(source: Path, out: Path, world_size: int, **options: Any) -> None:
    stored = open_checkpoint(open_store(source))
    for name, (stage, zero) in CASES.items():
        export_deepspeed(
            stored,
            str(out / name),
            stage=stage,
            world_size=world_size,
            sub_group_size=zero.get("sub_group_size", 10**9),
            round_robin="round_robin_gradients" in zero,
            **options,
        )


def test_deepspeed_resumes_plain_training(tmp_path: Path, ranks: RankPool) -> None:
    model = small_model()
    model.scale.copy_(BUFFER)
    model.frozen.weight.data.copy_(FROZEN)
    optimizer = adamw(param_groups(model))
    scheduler = cosine(optimizer)
    for _ in range(3):
        F.cross_entropy(model(torch.arange(13)), torch.arange(13).flip(0)).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "client_state": {"epoch": 4}}
    shardckpt.save(tmp_path / "ckpt", state, step=3)
    named = {name: param for name, param in model.named_parameters() if param.requires_grad}
    known = (
        {name: param.detach().clone() for name, param in named.items()},
        {name: {key: value.clone() for key, value in optimizer.state[param].items()} for name, param in named.items()},
    )
    order = [name for name, _ in model.named_parameters()]
    export_cases(tmp_path / "ckpt", tmp_path / "out", 2, order=order, dtype="bfloat16")
    for found in ranks.run(2, load_all, str(tmp_path / "out"), CASES, known, "bf16", timeout=240):
        for each in found.values():
            assert each["global_steps"] == each["schedule"] == 3 and each["client"] == 4
            assert each["weight_decay"] == [MATRIX_DECAY, 0.0] and each["lr"] == scheduler.get_last_lr()
            assert each["optimizer"] == "AdamW" and each["scale"] == 1.0


def save_with_plugin(root: str, stage: int, dtype: str) -> tuple[Known, float]:
    engine = make_engine(stage, dtype, scheduler=cosine)
    engine.module.scale.copy_(BUFFER)
    set_frozen(engine)
    train(engine, first=1, count=3)
    with attach(engine, root):
        engine.save_checkpoint(root, client_state={"epoch": 6})
    return (masters(engine), moments(engine)), engine.optimizer.loss_scaler.cur_scale


def set_frozen(engine: Any) -> None:
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([engine.module.frozen.weight], modifier_rank=0), torch.no_grad():
        engine.module.frozen.weight.copy_(FROZEN)


@pytest.mark.parametrize(("stage", "ranks_saved", "dtype"), [(3, 3, "bf16"), (1, 4, "fp16")])
def test_deepspeed_resumes_what_it_saved_at_another_stage_and_world_size(
    tmp_path: Path, ranks: RankPool, stage: int, ranks_saved: int, dtype: str
) -> None:
    (known, scale), *_ = ranks.run(ranks_saved, save_with_plugin, str(tmp_path / "run"), stage, dtype, timeout=240)
    export_cases(tmp_path / "run", tmp_path / "out", 2)
    for found in ranks.run(2, load_all, str(tmp_path / "out"), CASES, known, dtype, timeout=240):
        for each in found.values():
            assert each["global_steps"] == 3 and each["client"] == 6
            assert each["weight_decay"] == [MATRIX_DECAY, 0.0] and each["scale"] == scale
