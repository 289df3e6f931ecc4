# SPDX-License-Identifier: Apache-2.0
"""Optimizers, loss scales, offloaded state and ways of staging: bit-exact after a load at another stage and world size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import shardckpt
from shardckpt.integrations.deepspeed import attach
from tests.deepspeed.engines import (
    SmallModel,
    adamw,
    computed_with,
    make_engine,
    masters,
    moments,
    needs_deepspeed,
    open_deepspeed,
    train,
)
from tests.deepspeed.test_attach import same
from tests.ranks import RankPool

pytestmark = [needs_deepspeed, pytest.mark.slow]

Groups = list[dict[str, Any]]


class SignMomentum(Optimizer):
    """Steps by the sign of a momentum, as Lion and Muon-like optimizers of flat tensors do, and counts in a plain int."""

    def __init__(self, params: Groups, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "beta": 0.9})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                state.setdefault("momentum_buffer", torch.zeros_like(param))
                state["count"] = state.get("count", 0) + 1
                state["momentum_buffer"].mul_(group["beta"]).add_(param.grad)
                param.add_(state["momentum_buffer"].sign(), alpha=-group["lr"])


def make_optimizer(kind: str) -> Callable[[Groups], Optimizer]:
    made: dict[str, Callable[[Groups], Optimizer]] = {
        "adamw": adamw,
        "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
        "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-3, centered=True, momentum=0.5),
        "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-2),
        "amsgrad": lambda groups: torch.optim.Adam(groups, lr=1e-2, amsgrad=True),
        "sign": SignMomentum,
    }
    return made[kind]


class Scaled(SmallModel):
    """With a parameter of one element and a buffer that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Tensor
        self.temperature = nn.Parameter(torch.tensor([1.5]))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        found: Tensor = super().forward(tokens) * self.temperature
        return found


def save_kinds(root: str, kinds: list[str], stage: int) -> dict[str, Any]:
    known = {}
    for kind in kinds:
        engine = make_engine(stage, "fp32" if kind == "adafactor" else "bf16", optimizer=make_optimizer(kind))
        with attach(engine):
            train(engine, first=1, count=2)
            known[kind] = masters(engine), moments(engine)
            engine.save_checkpoint(f"{root}/{kind}")
    return known


def load_kinds(root: str, known: dict[str, Any], stage: int) -> None:
    for kind, (weights, states) in known.items():
        dtype = "fp32" if kind == "adafactor" else "bf16"
        engine = make_engine(stage, dtype, seed=8, optimizer=make_optimizer(kind))
        with attach(engine):
            engine.load_checkpoint(f"{root}/{kind}")
            assert same(masters(engine), weights), kind
            assert same(moments(engine), states), kind
            train(engine, first=3, count=1)
            engine.save_checkpoint(f"{root}/{kind}-again")


@pytest.mark.parametrize(("saved_at", "loaded_at"), [(1, 3), (3, 2)])
def test_optimizers(ranks: RankPool, tmp_path: Path, saved_at: int, loaded_at: int) -> None:
    kinds = ["sgd", "rmsprop", "adafactor", "amsgrad", "sign"]
    known = ranks.run(2, save_kinds, str(tmp_path), kinds, saved_at, timeout=250)[0]
    ranks.run(3, load_kinds, str(tmp_path), known, loaded_at, timeout=250)


LAYOUTS: list[tuple[int, str, dict[str, Any]]] = [
    (2, "bf16", {"round_robin_gradients": True}),
    (1, "fp32", {"parameter_alignment": True}),
    (3, "bf16", {"sub_group_size": 40}),
    (3, "bf16", {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}),
]
"""Stage, dtype and options of ZeRO that move parameters to other places."""


def save_layouts(root: str) -> list[Any]:
    found = []
    for at, (stage, dtype, options) in enumerate(LAYOUTS):
        engine = make_engine(stage, dtype, **options)
        with attach(engine):
            train(engine, first=1, count=2)
            engine.save_checkpoint(f"{root}/{at}")
        found.append(computed_with(engine))
    return found


def load_layouts(root: str) -> list[Any]:
    """Each checkpoint, into an engine with the options of the one before; what it computes with, and its own checkpoint."""
    found = []
    for at in range(len(LAYOUTS)):
        stage, dtype, options = LAYOUTS[at - 1]
        engine = make_engine(stage, dtype, seed=7, **options)
        with attach(engine):
            engine.load_checkpoint(f"{root}/{at}")
            engine.save_checkpoint(f"{root}/{at}-again")
            found.append(computed_with(engine))
            train(engine, first=3, count=1)
    return found


def test_each_order_of_parameters_loads_into_each_other(ranks: RankPool, tmp_path: Path) -> None:
    """By what engines compute with: with round_robin_gradients, DeepSpeed's own addresses of masters are wrong."""
    saved = ranks.run(3, save_layouts, str(tmp_path), timeout=250)[1]
    loaded = ranks.run(2, load_layouts, str(tmp_path), timeout=250)[0]
    for at in range(len(LAYOUTS)):
        state, again = (shardckpt.load(f"{tmp_path}/{at}{suffix}").state for suffix in ("", "-again"))
        trained = [name for name in saved[at] if not name.startswith("frozen")]
        for rounded in (saved[at], loaded[at]):
            assert all(same(rounded[name], state["model"][name].to(rounded[name].dtype)) for name in trained), at
        assert all(same(again["model"][name], state["model"][name]) for name in trained), at
        assert same(again["optimizer"]["state"], state["optimizer"]["state"]), at


def odd(seed: int) -> Scaled:
    torch.manual_seed(seed)
    return Scaled()


def save_odd(root: str, stage: int) -> Any:
    engine = make_engine(stage, model=odd(0))
    with attach(engine):
        train(engine, first=1, count=2)
        engine.save_checkpoint(root)
    return masters(engine), moments(engine)


def load_odd(root: str, known: Any, stage: int) -> int:
    engine = make_engine(stage, model=odd(6))
    with attach(engine):
        engine.load_checkpoint(root)
    assert same(masters(engine), known[0]) and same(moments(engine), known[1])
    assert torch.equal(computed_with(engine)["temperature"], known[0]["temperature"].bfloat16())
    return int(engine.module.calls)


@pytest.mark.parametrize(("saved_at", "loaded_at"), [(1, 2), (2, 3), (3, 1)])
def test_tiny_parameters_and_buffers(ranks: RankPool, tmp_path: Path, saved_at: int, loaded_at: int) -> None:
    known = ranks.run(2, save_odd, str(tmp_path), saved_at, timeout=200)[1]
    assert ranks.run(3, load_odd, str(tmp_path), known, loaded_at, timeout=200) == [2, 2, 2]


def save_scaled(root: str, stage: int) -> Any:
    engine = make_engine(stage, "fp16")
    with attach(engine):
        train(engine, first=1, count=5)
        engine.save_checkpoint(root)
        scaler = vars(engine.optimizer.loss_scaler)
        return train(engine, first=6, count=4), scaler["cur_scale"], scaler["cur_iter"]


def load_scaled(root: str, stage: int) -> Any:
    engine = make_engine(stage, "fp16", seed=2)
    with attach(engine):
        engine.load_checkpoint(root)
        return train(engine, first=6, count=4), *(vars(engine.optimizer.loss_scaler)[key] for key in ("cur_scale", "cur_iter"))


def test_the_loss_scale_goes_on(ranks: RankPool, tmp_path: Path) -> None:
    for stage in (2, 3):
        root = f"{tmp_path}/{stage}"
        wanted = ranks.run(2, save_scaled, root, stage, timeout=200)
        assert wanted[0][1:] != (256, 0)
        assert ranks.run(2, load_scaled, root, stage, timeout=200) == wanted


def save_offloaded(root: str, stage: int) -> Any:
    engine = make_engine(stage, offload_optimizer={"device": "cpu"})
    with attach(engine, options=shardckpt.Options(stage="lazy")):
        train(engine, first=1, count=2)
        known = masters(engine), moments(engine)
        engine.save_checkpoint(root)
        train(engine, first=3, count=2)
    return known


def load_offloaded(root: str, known: Any, stage: int) -> None:
    engine = make_engine(stage, seed=2, offload_optimizer={"device": "cpu"})
    with attach(engine):
        engine.load_checkpoint(root)
        assert same(masters(engine), known[0]) and same(moments(engine), known[1])
        train(engine, first=3, count=1)


def test_offload_to_cpu(ranks: RankPool, tmp_path: Path) -> None:
    for saved_at, loaded_at in ((2, 3), (3, 1)):
        root = f"{tmp_path}/{saved_at}"
        known = ranks.run(2, save_offloaded, root, saved_at, timeout=200)[0]
        ranks.run(3, load_offloaded, root, known, loaded_at, timeout=200)


def save_while_training(root: str, background: str) -> list[Any]:
    """Each stage and way of staging; training goes on at once."""
    known = []
    for stage in (1, 2, 3):
        engine = make_engine(stage)
        train(engine, first=1, count=1)
        for how in ("eager", "lazy"):
            options = shardckpt.Options(stage=how, background=background)  # type: ignore[arg-type]
            with attach(engine, f"{root}/{stage}-{how}", options=options) as attachment:
                known.append((f"{stage}-{how}", masters(engine), moments(engine)))
                engine.save_checkpoint("run")
                train(engine, first=2, count=2)
                assert attachment.last is not None
                attachment.last.result()
            attachment.detach()
    return known


@pytest.mark.parametrize("background", ["thread", "process"])
def test_training_goes_on_while_a_save_is_staged(ranks: RankPool, tmp_path: Path, background: str) -> None:
    for name, weights, states in ranks.run(2, save_while_training, str(tmp_path), background, timeout=200)[0]:
        state = shardckpt.load(f"{tmp_path}/{name}").state
        assert same({fqn: state["model"][fqn] for fqn in weights}, weights), name
        stored = {
            fqn: {key: value if value.dim() else value.item() for key, value in entries.items()}
            for fqn, entries in state["optimizer"]["state"].items()
        }
        assert same(stored, {fqn: states[fqn] for fqn in stored}) and stored.keys() == states.keys(), name


def save_model_only(root: str) -> Any:
    engine = make_engine(3)
    with attach(engine):
        train(engine, first=1, count=1)
        engine.save_checkpoint(root)
    return computed_with(engine)


def load_for_use(root: str) -> list[Any]:
    """Engines without an optimizer."""
    deepspeed = open_deepspeed()
    found = []
    for stage in (0, 3):
        settings = {"train_batch_size": 2, "bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
        engine, *_ = deepspeed.initialize(model=SmallModel(), config=settings)
        with attach(engine):
            assert engine.load_checkpoint(root)[0] is not None
            engine.save_checkpoint(f"{root}/again-{stage}")
        found.append(computed_with(engine))
    return found


def test_an_engine_without_an_optimizer_loads_the_weights(ranks: RankPool, tmp_path: Path) -> None:
    wanted = ranks.run(3, save_model_only, str(tmp_path), timeout=200)[0]
    for found in ranks.run(2, load_for_use, str(tmp_path), timeout=200)[1]:
        assert same(found, wanted)
