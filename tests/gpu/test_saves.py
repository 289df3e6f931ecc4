# SPDX-License-Identifier: Apache-2.0
"""Saves of a state on a GPU that does everything as late as it may: exact, and without a thread that waits for the GPU."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import shardckpt
from shardckpt import Options, StateChanged
from shardckpt.guard import STEP_GUARD
from tests.engine.guarding import Net, backward
from tests.engine.waiting import PATIENCE
from tests.gpu.streams import Gpu, with_gpu
from tests.ranks import RankPool

Stage = Literal["eager", "lazy"]


class Training:
    """A net of floats, which lie on the GPU, and its optimizer, whose step counters lie in host memory."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = Net()
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.1)
        self.seen = torch.zeros(5, dtype=torch.int64)
        self.train()

    def train(self) -> None:
        backward(self.net)
        self.optimizer.step()
        with torch.no_grad():
            self.seen += 1

    def state(self) -> dict[str, Any]:
        # the counter belongs to no optimizer
        return {"net": self.net, "optimizer": self.optimizer, "seen": self.seen}

    def copies(self) -> dict[str, torch.Tensor]:
        """The state now: what the parameters, the buffers and the optimizer have."""
        found = {f"net/{name}": value.clone() for name, value in self.net.state_dict().items()}
        names = {id(param): name for name, param in self.net.named_parameters()}
        for param, slots in self.optimizer.state.items():
            found |= {f"optimizer/{names[id(param)]}/{slot}": value.clone() for slot, value in slots.items()}
        return found | {"seen": self.seen.clone()}


def stored(root: Path | str, step: int) -> dict[str, torch.Tensor]:
    """The same of what was saved."""
    state = shardckpt.load(f"{root}/step-{step:08d}").state
    found = {f"net/{name}": value for name, value in state["net"].items()}
    for name, slots in state["optimizer"]["state"].items():
        found |= {f"optimizer/{name}/{slot}": value for slot, value in slots.items()}
    return found | {"seen": state["seen"]}


def differing(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    assert found.keys() == wanted.keys()
    return [name for name, value in wanted.items() if not torch.equal(found[name], value)]


@pytest.mark.parametrize("background", ["thread", "process"])
@pytest.mark.parametrize("stage", ["eager", "lazy"])
def test_a_snapshot_is_the_state_at_the_call(tmp_path: Path, stage: Stage, background: Literal["thread", "process"]) -> None:
    gpu, training = Gpu(), Training()
    with with_gpu(gpu)(tmp_path, options=Options(stage=stage, background=background)) as ckpt:
        for step in (1, 2, 3):
            wanted = training.copies()
            handle = ckpt.save(step, training.state())
            assert stage == "eager" or handle.state == "requested"
            training.train()
            training.train()
            handle.result(PATIENCE)
            assert differing(stored(tmp_path, step), wanted) == []
            assert differing(training.copies(), wanted)
    # twice in lazy saves: what no optimizer owns is copied at once
    assert gpu.log.count("follow") == (3 if stage == "eager" else 6)
    # once for each save, and again for a step that comes while the rest is settled
    assert gpu.waits == 0 if stage == "eager" else gpu.waits >= 3
    assert gpu.allocated == 1 << 16


def save_on_every_rank(root: str, stage: Stage) -> list[str]:
    training = Training()
    with with_gpu(Gpu())(root, options=Options(stage=stage, timeout=PATIENCE)) as ckpt:
        wanted = training.copies()
        handle = ckpt.save(1, training.state())
        training.train()
        handle.result(PATIENCE)
    return differing(stored(root, 1), wanted)


@pytest.mark.parametrize("stage", ["eager", "lazy"])
def test_replicas_on_gpus_are_compared_as_they_were(ranks: RankPool, tmp_path: Path, stage: Stage) -> None:
    assert ranks.run(2, save_on_every_rank, str(tmp_path / "run"), stage) == [[], []]


def test_a_change_that_nobody_announced_is_found(tmp_path: Path) -> None:
    gpu, training = Gpu(), Training()
    with with_gpu(gpu)(tmp_path, options=Options(stage="lazy")) as ckpt:
        handle = ckpt.save(1, training.state())
        with torch.no_grad():
            training.net.first.weight.mul_(2)
        training.train()
        with pytest.raises(StateChanged, match="first"):
            handle.result(PATIENCE)
        assert ckpt.steps() == []
        handle = ckpt.save(2, training.state())
        training.train()
        handle.result(PATIENCE)
        assert ckpt.steps() == [2]


@pytest.mark.parametrize("stage", ["eager", "lazy"])
def test_a_gpu_that_fails_fails_the_save_and_not_training(
    tmp_path: Path, stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    gpu, training = Gpu(), Training()
    with with_gpu(gpu)(tmp_path, options=Options(stage=stage)) as ckpt:
        gpu.broken = RuntimeError("CUDA error: an illegal memory access was encountered")
        with caplog.at_level(logging.CRITICAL):
            handle = ckpt.save(1, training.state())
            training.train()
            with pytest.raises(shardckpt.RankFailed, match="illegal memory access"):
                handle.result(PATIENCE)
        gpu.broken = None
        wanted = training.copies()
        handle = ckpt.save(2, training.state())
        training.train()
        handle.result(PATIENCE)
        assert ckpt.steps() == [2]
    assert differing(stored(tmp_path, 2), wanted) == []


def test_a_wait_for_staging_ends_when_the_gpu_is_done(tmp_path: Path) -> None:
    gpu, training = Gpu(), Training()
    with with_gpu(gpu)(tmp_path, options=Options(stage="lazy")) as ckpt:
        handle = ckpt.save(1, training.state())
        STEP_GUARD.wait()
        handle.wait_staged(PATIENCE)
        assert gpu.waits == 1
        handle.result(PATIENCE)


def test_a_state_without_a_byte_on_the_gpu(tmp_path: Path) -> None:
    gpu = Gpu()
    with with_gpu(gpu)(tmp_path) as ckpt:
        ckpt.save(1, {"empty": torch.empty(0, 3), "n": 1}).result(PATIENCE)
        ckpt.save(2, {"n": 1}).result(PATIENCE)
    assert gpu.work == []
