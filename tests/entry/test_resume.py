# SPDX-License-Identifier: Apache-2.0
"""`resume`: what is made, what is restored, on how many ranks, and what is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

import shardckpt
from tests.entry.conformance import contents, differing
from tests.models import Job, Net, differences, make_job, parallelize, snapshot
from tests.ranks import RankPool


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


def trained(root: Path, step: int = 5) -> dict[str, Any]:
    """A run of one process that has saved one step as a `Checkpointer` does."""
    model = small(1)
    optimizer = AdamW(model.parameters(), lr=0.1)
    scheduler = StepLR(optimizer, step_size=2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, 3)).sum().backward()
        optimizer.step()
        scheduler.step()
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    with shardckpt.Checkpointer(root) as ckpt:
        ckpt.save(step, state, wait=True)
    return state


def test_a_first_start_makes_everything_and_restores_nothing(tmp_path: Path) -> None:
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    resumed = shardckpt.resume(
        tmp_path / "run", model, optimizer=partial(AdamW, lr=0.25), scheduler=partial(StepLR, step_size=7)
    )
    assert resumed.restored is None
    assert resumed.model is model
    assert type(resumed.optimizer) is AdamW
    assert (resumed.optimizer.param_groups[0]["lr"], resumed.scheduler.step_size) == (0.25, 7)
    assert resumed.scheduler.optimizer is resumed.optimizer
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("engine", ["async", "sync"])
def test_callables_are_called_and_what_they_make_is_restored(tmp_path: Path, engine: str) -> None:
    expected = trained(tmp_path)
    model, optimizer, scheduler, restored = shardckpt.resume(
        tmp_path, small(2), optimizer=AdamW, scheduler=partial(StepLR, step_size=9), engine=engine
    )
    assert restored is not None
    assert restored.step == 5
    found = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    assert differing(contents(found), contents(expected)) == []


def test_objects_are_used_as_they_are(tmp_path: Path) -> None:
    expected = trained(tmp_path)
    model = small(2)
    optimizer = AdamW(model.parameters())
    scheduler = StepLR(optimizer, step_size=9)
    resumed = shardckpt.resume(tmp_path, model, optimizer=optimizer, scheduler=scheduler)
    assert resumed[:3] == (model, optimizer, scheduler)
    found = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    assert differing(contents(found), contents(expected)) == []


def test_a_model_alone_and_a_step_by_number(tmp_path: Path) -> None:
    with shardckpt.Checkpointer(tmp_path) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, {"model": small(step)}, wait=True)
    resumed = shardckpt.resume(tmp_path, small(9), step=2)
    assert resumed.restored is not None
    assert (resumed.restored.step, resumed.optimizer, resumed.scheduler) == (2, None, None)
    assert torch.equal(resumed.model.weight, small(2).weight)  # type: ignore[arg-type]
    with pytest.raises(shardckpt.CheckpointNotFound):
        shardckpt.resume(tmp_path, small(9), step=4)


def test_the_optimizer_gets_the_parameters_that_require_grad(tmp_path: Path) -> None:
    given: list[Any] = []

    def make(params: Any) -> Optimizer:
        given.extend(params)
        groups = [{"params": [p], "weight_decay": 0.1 * at} for at, p in enumerate(given)]
        return SGD(groups, lr=0.5)

    model = Net()
    resumed = shardckpt.resume(tmp_path, model, optimizer=make)
    expected = [param for param in model.parameters() if param.requires_grad]
    assert [id(param) for param in given] == [id(param) for param in expected]
    assert id(model.frozen) not in map(id, given)
    assert len(resumed.optimizer.param_groups) == len(expected)


def test_extra_parts_are_restored_and_values_written_back(tmp_path: Path) -> None:
    with shardckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, {"model": small(1), "tokens": 640, "progress": {"seen": [1, 2]}, "mean": torch.ones(2)}, wait=True)
    extra: dict[str, Any] = {"tokens": 0, "progress": {"seen": []}, "mean": torch.zeros(2)}
    mean = extra["mean"]
    shardckpt.resume(tmp_path, small(), extra=extra)
    assert (extra["tokens"], extra["progress"], extra["mean"].tolist()) == (640, {"seen": [1, 2]}, [1.0, 1.0])
    assert extra["mean"] is mean


# ---- real ranks


def save_job(root: str, kind: str, steps: int) -> dict[str, Any]:
    job = make_job(kind, seed=3)
    job.train(steps)
    with shardckpt.Checkpointer(root) as ckpt:
        ckpt.save(steps, job.state(), wait=True)
    return snapshot(job)


def resume_job(root: str, kind: str) -> tuple[int, int, dict[str, Any]]:
    torch.manual_seed(50)
    model, data_rank = parallelize(Net(), kind)
    extra: dict[str, Any] = {
        "rng": shardckpt.RNGState(),
        "progress": {"steps": 0, "seen": [], "mean": torch.zeros(3)},
    }
    _, optimizer, scheduler, restored = shardckpt.resume(
        root,
        model,
        optimizer=groups_of(model),
        scheduler=partial(CosineAnnealingLR, T_max=20),
        extra=extra,
    )
    assert restored is not None
    job = Job(model, optimizer, scheduler, data_rank, extra["progress"])
    return restored.step, restored.info.world_size, snapshot(job)


def groups_of(model: nn.Module) -> Any:
    """A callable of parameters that makes two groups of them, as jobs have."""
    norms = {id(param) for name, param in model.named_parameters() if "norm" in name}

    def make(params: Any) -> Optimizer:
        params = list(params)
        groups = [
            {"params": [param for param in params if id(param) not in norms], "weight_decay": 0.1},
            {"params": [param for param in params if id(param) in norms], "weight_decay": 0.0, "lr": 2e-2},
        ]
        return AdamW(groups, lr=1e-2, foreach=False)

    return make


@pytest.mark.parametrize(("saved", "resumed", "size"), [("fsdp2", "ddp", 3), ("ddp", "fsdp2", 4), ("tp", "fsdp2", 1)])
def test_what_a_checkpointer_saved_on_two_ranks_goes_on_on_others(
    ranks: RankPool, tmp_path: Path, saved: str, resumed: str, size: int
) -> None:
    expected = ranks.run(2, save_job, str(tmp_path), saved, 3, timeout=120)[0]
    for step, world_size, found in ranks.run(size, resume_job, str(tmp_path), resumed, timeout=120):
        assert (step, world_size) == (3, 2)
        assert differences(found, expected) == []


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"model": torch.ones(2)}, "is no torch.nn.Module"),
        ({"optimizer": "adam"}, "optimizer='adam' is neither an optimizer nor a function"),
        ({"optimizer": lambda params: None}, "optimizer= was called and made None"),
        ({"scheduler": 3}, "scheduler=3 is neither a scheduler nor a function"),
        ({"scheduler": partial(StepLR, step_size=1)}, "there is no optimizer to make it of"),
        ({"optimizer": SGD, "scheduler": lambda optimizer: 7}, "scheduler= was called and made 7"),
        ({"model": small().requires_grad_(False), "optimizer": SGD}, "no parameter of the model requires grad"),
        ({"extra": [1]}, r"extra=\[1\] is not a mapping with str keys"),
        ({"extra": {"optimizer": 1}}, r"extra has \['optimizer'\]"),
        ({"engine": "nonsense"}, "checkpoint engine 'nonsense' is not known; there are: async, lazy, process, sync"),
        ({"fallback": True, "expect_digest": "0" * 64}, "leave one of them out"),
    ],
)
def test_what_is_refused(tmp_path: Path, arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(shardckpt.ConfigError, match=why):
        shardckpt.resume(tmp_path, **({"model": small()} | arguments))


def test_a_checkpoint_of_other_names_is_told(tmp_path: Path) -> None:
    with shardckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, {"model": small(1)}, wait=True)
    with pytest.raises(shardckpt.MissingNames, match="optimizer"):
        shardckpt.resume(tmp_path, small(), optimizer=SGD)
