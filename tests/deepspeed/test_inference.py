# SPDX-License-Identifier: Apache-2.0
"""Weights of DeepSpeed engines of all stages go into models that are only run, without DeepSpeed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import shardckpt
from shardckpt.integrations.deepspeed import attach
from tests.deepspeed.engines import SmallModel, computed_with, make_engine, masters, needs_deepspeed, train
from tests.ranks import RankPool

pytestmark = [needs_deepspeed, pytest.mark.slow, pytest.mark.timeout(900)]


def train_and_save(root: str, stage: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Master weights, and what the engine computes with."""
    engine = make_engine(stage, "bf16")
    with attach(engine, root=root):
        train(engine, first=1, count=2)
        engine.save_checkpoint(root)
    found = masters(engine), computed_with(engine)
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_an_engine_computes_with_is_what_is_loaded(ranks: RankPool, tmp_path: Path, stage: int) -> None:
    full, rounded = ranks.run(2, train_and_save, str(tmp_path / "run"), stage, timeout=240)[0]
    for dtype, expected in ((torch.bfloat16, rounded), (torch.float32, full)):
        with torch.device("meta"):
            model = SmallModel()
        restored = shardckpt.load_for_inference(tmp_path / "run", model, shardckpt.InferenceConfig(dtype=dtype))
        found = dict(model.named_parameters())
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
        assert {param.dtype for param in found.values()} == {dtype}
        assert model.head.weight is model.embed.weight
        assert restored.info.bytes_needed < sum(4 * param.numel() for param in found.values()) + 100
        assert model(torch.ones(1, 3, dtype=torch.int64)).dtype == dtype
