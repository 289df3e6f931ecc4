# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of DeepSpeed engines load in plain PyTorch training, on one process and under FSDP2; and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import shardckpt
from shardckpt.integrations.deepspeed import attach
from tests.deepspeed.engines import (
    MATRIX_DECAY,
    SmallModel,
    adamw,
    batch,
    computed_with,
    group_values,
    make_engine,
    masters,
    moments,
    needs_deepspeed,
    param_groups,
    small_model,
    train,
)
from tests.ranks import RankPool

pytestmark = [needs_deepspeed, pytest.mark.slow, pytest.mark.timeout(900)]

Known = tuple[dict[str, Tensor], dict[str, dict[str, Any]]]
STAGES = (1, 2, 3)


class Plain:
    """Training without DeepSpeed: on one process, or under FSDP2 on several."""

    def __init__(self, *, sharded: bool, seed: int) -> None:
        self.model: SmallModel = small_model(seed)
        if sharded:
            fully_shard(self.model)
        self.optimizer = adamw(param_groups(self.model))

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}

    def train(self, first: int) -> None:
        tokens, wanted = batch(first)
        F.cross_entropy(self.model(tokens).flatten(0, 1), wanted.flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def known(self) -> Known:
        """Trainable weights and their optimizer state, in full."""
        named = {name: param for name, param in self.model.named_parameters() if param.requires_grad}
        states = {name: {key: whole(value) for key, value in self.optimizer.state[p].items()} for name, p in named.items()}
        return {name: whole(param) for name, param in named.items()}, states


def whole(value: Tensor) -> Tensor:
    """A tensor in full; collective for what is sharded."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def save_engines(root: str) -> dict[int, Known]:
    """What an engine of each stage has saved."""
    known = {}
    for stage in STAGES:
        engine = make_engine(stage)
        train(engine, first=1, count=2)
        known[stage] = masters(engine), moments(engine)
        with attach(engine, f"{root}/{stage}"):
            engine.save_checkpoint(f"{root}/{stage}")
    return known


def load_plainly(root: str, saved: dict[int, Known], sharded: bool) -> None:
    """What each stage has saved fills a model and an optimizer that have trained on other weights."""
    for stage, known in saved.items():
        job = Plain(sharded=sharded, seed=1)
        job.train(9)
        with shardckpt.Checkpointer(f"{root}/{stage}") as ckpt:
            # DeepSpeed has rounded the frozen parameters to what it computes with
            restored = ckpt.restore(job.state, convert_dtype=True)
        assert restored is not None and restored.step == 2
        require_equal(job.known(), known)
        assert [group["weight_decay"] for group in job.optimizer.param_groups] == [MATRIX_DECAY, 0.0]
        job.train(3)


def require_equal(found: Known, known: Known) -> None:
    weights, states = known
    assert found[0].keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(found[0][name], weight), name
        assert float(found[1][name]["step"]) == float(states[name]["step"]) == 2
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(found[1][name][key], states[name][key]), (name, key)


@pytest.mark.parametrize(("world", "sharded"), [(1, False), (2, True)])
def test_plain_training_goes_on_from_an_engine(ranks: RankPool, tmp_path: Path, world: int, sharded: bool) -> None:
    saved = ranks.run(3, save_engines, str(tmp_path), timeout=240)[0]
    ranks.run(world, load_plainly, str(tmp_path), saved, sharded, timeout=200)


def save_plainly(root: str) -> Known:
    """FSDP2 training, saved under the names model and optimizer."""
    job = Plain(sharded=True, seed=0)
    job.train(1)
    job.train(2)
    with shardckpt.Checkpointer(root) as ckpt:
        ckpt.save(2, job.state, wait=True)
    return job.known()


def load_into_engines(root: str, known: Known) -> None:
    """An engine of each stage, which has trained on other weights, goes on from it."""
    frozen = small_model().frozen
    for stage in STAGES:
        engine = make_engine(stage, seed=1)
        train(engine, first=9, count=1)
        with attach(engine, root):
            engine.load_checkpoint(root)
        require_equal((masters(engine), moments(engine)), known)
        assert engine.global_steps == 2
        assert group_values(engine, "weight_decay") == [MATRIX_DECAY, 0.0]
        computed = computed_with(engine)
        assert torch.equal(computed["frozen.weight"], frozen.weight.bfloat16())
        train(engine, first=3, count=1)


def test_engines_go_on_from_plain_training(ranks: RankPool, tmp_path: Path) -> None:
    known = ranks.run(2, save_plainly, str(tmp_path), timeout=200)[0]
    ranks.run(3, load_into_engines, str(tmp_path), known, timeout=240)
