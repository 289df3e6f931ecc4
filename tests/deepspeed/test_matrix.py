# SPDX-License-Identifier: Apache-2.0
"""Trained at ZeRO stage S on W ranks, resumed at stage S' on W' ranks: bit-exact, and so is the training that follows.

Nothing here believes shardckpt: `masters` and `moments` look into the engines by themselves, and what the next losses must
be is told by an engine on W' ranks that was put into the same state without a checkpoint (`start_from`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shardckpt.integrations.deepspeed import attach
from tests.deepspeed.engines import (
    DTYPES,
    MATRIX_DECAY,
    computed_with,
    group_values,
    make_engine,
    masters,
    moments,
    needs_deepspeed,
    small_model,
    start_from,
    train,
)
from tests.ranks import RankPool

pytestmark = [needs_deepspeed, pytest.mark.slow, pytest.mark.timeout(900)]

STAGES = (1, 2, 3)
STEPS = 3
"""Steps before the save."""
MORE = 2
"""Steps after the load."""


@dataclass
class Known:
    """The state of an engine when it was saved, in full, as seen without shardckpt."""

    masters: dict[str, Tensor]
    moments: dict[str, dict[str, Any]]


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Another learning rate at each step."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))


def save_all(root: str, dtype: str) -> dict[int, Known]:
    """Train an engine of each stage, and save it."""
    known = {}
    for stage in STAGES:
        engine = make_engine(stage, dtype, scheduler=schedule)
        train(engine, first=1, count=STEPS)
        known[stage] = Known(masters(engine), moments(engine))
        with attach(engine, root=f"{root}/{stage}"):
            engine.save_checkpoint(f"{root}/{stage}", client_state={"stage": stage})
    return known


def resume_all(root: str, dtype: str, saved: dict[int, Known]) -> dict[str, list[str]]:
    """Load what each stage has saved into an engine of each stage; what is wrong, for each pair of stages.

    The engine has other weights, frozen ones too, and has trained, before each load. The reference has taken as many steps as
    what is loaded, so that schedule and loss scale are where they would be.
    """
    wrong = {}
    for stage in STAGES:
        engine = make_engine(stage, dtype, seed=1, scheduler=schedule)
        train(engine, first=50, count=1)
        with attach(engine) as attachment:
            for origin, known in saved.items():
                path, client_state = engine.load_checkpoint(f"{root}/{origin}")
                facts = (attachment.checkpointer.steps(), Path(path or "").name, client_state, engine.global_steps)
                found = differences(engine, known, dtype)
                if facts != ([STEPS], f"step-{STEPS:08}", {"stage": origin}, STEPS):
                    found.append(f"load_checkpoint: {facts}")
                if losses_after(engine) != reference_losses(stage, dtype, known):
                    found.append("the next losses")
                wrong[f"{origin} to {stage}"] = found
    return wrong


def differences(engine: Any, known: Known, dtype: str) -> list[str]:
    """Which masters, moments, parameters and options are not those that were saved, bit for bit."""
    found, states, computed = masters(engine), moments(engine), computed_with(engine)
    frozen = {name: param.detach() for name, param in small_model().named_parameters() if not param.requires_grad}
    wanted = {name: param.to(DTYPES[dtype]) for name, param in {**known.masters, **frozen}.items()}
    wrong = [f"parameter {name}" for name in {**computed, **wanted} if not is_same(computed.get(name), wanted.get(name))]
    wrong += [f"master {name}" for name in {**found, **known.masters} if not is_same(found.get(name), known.masters.get(name))]
    for name, wanted_state in known.moments.items():
        if states[name].keys() != {"step", "exp_avg", "exp_avg_sq"} or states[name]["step"] != STEPS:
            wrong.append(f"states of {name}: {states[name]}")
        wrong += [f"{name}/{key}" for key in ("exp_avg", "exp_avg_sq") if not is_same(states[name][key], wanted_state[key])]
    options = {key: group_values(engine, key) for key in ("weight_decay", "lr")}
    if options != {"weight_decay": [MATRIX_DECAY, 0.0], "lr": [1e-2 / (1 + STEPS)] * 2}:
        wrong.append(f"options {options}")
    return wrong


def is_same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether both are there, with one dtype, shape, and content to the bit."""
    if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bits(one) == bits(other)


def losses_after(engine: Any) -> tuple[list[float], dict[str, bytes]]:
    """The next losses, and the bits of the weights that they have led to."""
    losses = train(engine, first=STEPS + 1, count=MORE)
    return losses, {name: bits(master) for name, master in masters(engine).items()}


def reference_losses(stage: int, dtype: str, known: Known) -> tuple[list[float], dict[str, bytes]]:
    """The same of an engine that has come to this state without a checkpoint, and was never interrupted."""
    reference = make_engine(stage, dtype, scheduler=schedule)
    train(reference, first=1, count=STEPS)
    start_from(reference, known.masters, known.moments)
    return losses_after(reference)


def bits(tensor: Tensor) -> bytes:
    """All bits of a tensor, to compare with ``==``."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


PAIRS = [(4, 2, "bf16"), (2, 4, "bf16"), (4, 3, "bf16"), (1, 4, "bf16"), (4, 2, "fp32"), (2, 3, "fp16")]


@pytest.mark.parametrize(("before", "after", "dtype"), PAIRS)
def test_resumes_bit_exactly(ranks: RankPool, tmp_path: Path, before: int, after: int, dtype: str) -> None:
    """At every stage, what every stage has saved; the next losses, too, equal those of an uninterrupted run."""
    saved = ranks.run(before, save_all, str(tmp_path), dtype, timeout=240)[0]
    wrong = ranks.run(after, resume_all, str(tmp_path), dtype, saved, timeout=280)
    assert wrong == [{f"{origin} to {stage}": [] for stage in STAGES for origin in STAGES}] * after
