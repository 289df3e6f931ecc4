# SPDX-License-Identifier: Apache-2.0
"""What an engine counts goes into a checkpoint as plain values, and comes back as it was."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from shardckpt.adapters.base import is_plain
from shardckpt.integrations.deepspeed.counters import counters_of, set_counters
from tests.deepspeed.engines import needs_deepspeed


class Part:
    """A curriculum: its state has NumPy arrays, as those of DeepSpeed's data sampler have."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def make_engine(part: Part, scaler: Any) -> Any:
    """As much of an engine as is asked."""
    return SimpleNamespace(
        global_steps=7,
        global_samples=91,
        skipped_steps=2,
        train_batch_size=lambda: 12,
        zero_optimization_stage=lambda: 2,
        get_data_types=lambda: (torch.float16, torch.float32),
        param_names={},
        basic_optimizer=None,
        optimizer=SimpleNamespace(loss_scaler=scaler),
        random_ltd_enabled=lambda: False,
        curriculum_learning_enabled=lambda: True,
        training_dataloader=SimpleNamespace(data_sampler=part),
        torch_autocast_z0_gradscaler=None,
    )


def make_scaler(scale: float) -> Any:
    return SimpleNamespace(dynamic=True, cur_scale=scale, cur_iter=9, last_overflow_iter=4, cur_hysteresis=1, dtype=torch.half)


@needs_deepspeed
def test_counters_curricula_and_loss_scale_come_back() -> None:
    generator: Any = np.random.RandomState(3).get_state()
    part = Part({"batch": [1, 2], "difficulty": np.float64(0.5), "np_rng_state": generator})
    stored = counters_of(make_engine(part, make_scaler(64.0)))
    assert is_plain(stored) and stored["dtype"] == "float16" and stored["zero_stage"] == 2
    target = make_engine(Part(), make_scaler(2.0))
    target.global_steps = target.global_samples = target.skipped_steps = 0
    set_counters(target, stored, 1, optimizer=True)
    assert (target.global_steps, target.global_samples, target.skipped_steps) == (7, 91, 2)
    assert target.optimizer.loss_scaler.cur_scale == 64.0
    found = target.training_dataloader.data_sampler.state
    assert found["batch"] == [1, 2] and found["difficulty"] == 0.5
    np.random.RandomState().set_state(found["np_rng_state"])
    assert found["np_rng_state"][1].dtype == np.uint32 and found["np_rng_state"][1].tolist() == generator[1].tolist()


def test_without_the_optimizer_the_loss_scale_stays() -> None:
    target = make_engine(Part(), make_scaler(2.0))
    stored = {"global_steps": 5, "loss_scaler": {"dynamic": True, "cur_scale": 64.0}}
    set_counters(target, stored, 5, optimizer=False)
    assert target.optimizer.loss_scaler.cur_scale == 2.0


def test_plain_training_gives_the_step(caplog: pytest.LogCaptureFixture) -> None:
    target = make_engine(Part(), make_scaler(2.0))
    set_counters(target, None, 3, optimizer=True)
    assert (target.global_steps, target.global_samples, target.skipped_steps) == (3, 36, 0)
    assert "no dynamic loss scale: it starts anew at 2" in caplog.text and "no state of data_sampler" in caplog.text
