# SPDX-License-Identifier: Apache-2.0
"""The engine's save_checkpoint and load_checkpoint, argument by argument, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardckpt
from shardckpt.errors import CheckpointNotFound, ConfigError, MissingNames, NotACheckpointRoot, StateError
from shardckpt.integrations.deepspeed import attach
from tests.deepspeed.engines import (
    SmallModel,
    computed_with,
    group_values,
    make_engine,
    masters,
    moments,
    needs_deepspeed,
    small_model,
    torch_optimizer,
    train,
)
from tests.ranks import RankPool

pytestmark = [needs_deepspeed, pytest.mark.slow]


def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Half the learning rate after each step."""
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


def same(first: Any, second: Any) -> bool:
    """Whether masters or moments are equal bit by bit."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else bool(first == second)


def save_tags(root: str) -> tuple[Any, Any]:
    """Steps 1 to 3 under tags of their own, the last one not to be loaded without its name."""
    engine = make_engine(2, scheduler=halving)
    known = []
    with attach(engine) as attachment:
        with pytest.raises(ConfigError, match="no Checkpointer yet"):
            attachment.checkpointer.steps()
        for step in (1, 2, 3):
            train(engine, first=step, count=1)
            known.append((masters(engine), moments(engine)))
            state = {"epoch": step, "rank": dist.get_rank(), "seen": torch.arange(step)}
            tag = None if step == 1 else f"tag{step}"
            assert engine.save_checkpoint(root, tag, client_state=state, save_latest=step < 3) is True
            assert attachment.last is not None and attachment.last.result().step == step
        assert attachment.checkpointer.steps() == [1, 2, 3]
    return known[0], known[1]


def load_tags(root: str, stage: int, known: tuple[Any, Any]) -> None:
    engine = make_engine(stage, seed=3, scheduler=halving)
    with attach(engine):
        path, client = engine.load_checkpoint(root)
        assert path is not None and path.endswith("step-00000002")
        assert client["epoch"] == 2 and client["rank"] == 0 and client["seen"].tolist() == [0, 1]
        assert same(masters(engine), known[1][0]) and same(moments(engine), known[1][1])
        assert (engine.global_steps, engine.global_samples, engine.skipped_steps) == (2, 24, 0)
        assert group_values(engine, "lr") == [2.5e-3, 2.5e-3] and engine.lr_scheduler.last_epoch == 2

        path, client = engine.load_checkpoint(root, tag="global_step1")
        assert path.endswith("step-00000001") and engine.global_steps == 1 and same(masters(engine), known[0][0])
        assert engine.load_checkpoint(root, "tag3")[1]["epoch"] == 3
        with pytest.raises(
            CheckpointNotFound, match=r"no checkpoint in .* has the tag 'tag7'; there are tag3, tag2, global_step1"
        ):
            engine.load_checkpoint(root, "tag7")
        with pytest.raises(ConfigError, match="custom_load_fn"):
            engine.load_checkpoint(root, custom_load_fn=print)
        assert engine.load_checkpoint(f"{root}/empty") == (None, None)
        engine.save_checkpoint(f"{root}/another")  # further directories close the ones that were used first
        assert engine.load_checkpoint(root, "tag2")[0] == path.replace("step-00000001", "step-00000002")


def load_parts(root: str, known: tuple[Any, Any]) -> None:
    weights, states = known[1]
    engine = make_engine(3, seed=3, scheduler=halving)
    with attach(engine):
        engine.load_checkpoint(root, load_module_only=True)
        assert same(masters(engine), weights) and not any(moments(engine).values())
        assert engine.global_steps == 0 and engine.lr_scheduler.last_epoch == 0
        engine.load_checkpoint(root, load_optimizer_states=False, load_lr_scheduler_states=False)
        assert not any(moments(engine).values()) and group_values(engine, "lr") == [1e-2, 1e-2]
        assert engine.global_steps == 2 and engine.lr_scheduler.last_epoch == 0
        # fresh moments and another learning rate
        train(engine, first=3, count=1)
        assert not same(moments(engine), states)


def test_tags_and_parts(ranks: RankPool, tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    known = ranks.run(4, save_tags, root, timeout=200)[0]
    ranks.run(2, load_tags, root, 1, known, timeout=200)
    ranks.run(2, load_parts, root, known, timeout=200)


class Wider(SmallModel):
    """One more layer."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(2, 2)


def load_strictly_and_not(root: str) -> None:
    torch.manual_seed(1)
    engine = make_engine(1, model=Wider())
    with attach(engine):
        with pytest.raises(MissingNames, match=r"missing in the checkpoint: .*model/extra\.bias"):
            engine.load_checkpoint(root, load_module_only=True)
        before = masters(engine)["extra.weight"]
        engine.load_checkpoint(root, load_module_only=True, load_module_strict=False)
        assert same(masters(engine)["extra.weight"], before)
        assert not same(masters(engine)["up.weight"], small_model(1).up.weight)
        with pytest.raises(MissingNames, match=r"optimizer/group_of/extra\.bias"):
            engine.load_checkpoint(root, load_module_strict=False)


def save_without_frozen(root: str) -> Any:
    engine = make_engine(3)
    with attach(engine, root):
        train(engine, first=1, count=1)
        engine.save_checkpoint("elsewhere", exclude_frozen_parameters=True)
    return masters(engine), computed_with(engine)


def load_without_frozen(root: str, stage: int) -> tuple[Any, Any]:
    engine = make_engine(stage, seed=9)
    with attach(engine, root):
        engine.load_checkpoint("elsewhere")
    return masters(engine), computed_with(engine)


def test_frozen_parameters_that_were_left_out_stay_as_they_are(ranks: RankPool, tmp_path: Path) -> None:
    root = str(tmp_path)
    weights, _ = ranks.run(2, save_without_frozen, root, timeout=200)[0]
    assert not [name for name in shardckpt.load(root).state["model"] if name.startswith("frozen")]
    own = small_model(9).frozen.weight.detach().bfloat16()
    for stage in (1, 3):
        loaded, rounded = ranks.run(3, load_without_frozen, root, stage, timeout=200)[2]
        assert same(loaded, weights) and torch.equal(rounded["frozen.weight"], own)
        assert torch.equal(rounded["up.weight"], weights["up.weight"].bfloat16())
    ranks.run(2, load_strictly_and_not, root, timeout=200)


def refuse(root: str) -> None:
    engine = make_engine(1, accumulate=3)
    with pytest.raises(ConfigError, match=r"needs the engine that deepspeed\.initialize returns, but got a SmallModel"):
        attach(engine.module)
    refused: list[tuple[str, Any, str]] = [
        ("pipeline_parallelism", True, "pipeline parallelism: not supported"),
        ("mp_world_size", 2, "tensor parallelism"),
        ("has_moe_layers", True, "MoE"),
    ]
    for name, value, message in refused:
        before = getattr(engine, name)
        setattr(engine, name, value)
        with pytest.raises(ConfigError, match=message):
            attach(engine)
        setattr(engine, name, before)
    attachment = attach(engine, root)
    with pytest.raises(ConfigError, match="replaced already"):
        attach(engine, root)
    train(engine, first=1, count=1)
    for call in (engine.save_checkpoint, engine.load_checkpoint):
        with pytest.raises(StateError, match="checkpoint after micro step 1 of 3 of a gradient accumulation") as caught:
            call(root)
        assert (caught.value.micro_step, caught.value.window) == (1, 3)
    train(engine, first=2, count=2)
    engine.save_checkpoint(root)
    attachment.detach()
    assert "save_checkpoint" not in vars(engine) and attachment.last is not None
    assert attachment.last.result().step == engine.global_steps == 1


def save_as_deepspeed(root: str) -> tuple[Any, Any]:
    """Two checkpoints of DeepSpeed itself; the masters and moments of the newer one."""
    engine = make_engine(1)
    for step in (1, 2):
        train(engine, first=step, count=1)
        engine.save_checkpoint(root, client_state={"epoch": step})
    with attach(engine, root) as attachment:
        with pytest.raises(NotACheckpointRoot):
            engine.save_checkpoint(root)
        assert attachment.last is None
    return masters(engine), moments(engine)


def go_on_from_deepspeed(old: str, new: str | None) -> tuple[Any, Any]:
    engine = make_engine(3)
    with attach(engine, new):
        place, client = engine.load_checkpoint(old)
        assert (place, client) == (f"{old}/global_step2", {"epoch": 2})
        assert (engine.global_steps, engine.loaded_checkpoint_dp_world_size) == (2, 2)
        found = masters(engine), moments(engine)
        assert engine.load_checkpoint(old, tag="global_step1")[1] == {"epoch": 1}
        assert engine.global_steps == 1
        with pytest.raises(CheckpointNotFound, match="there is no tag 'global_step7'"):
            engine.load_checkpoint(old, tag="global_step7")
        if new is not None:
            engine.save_checkpoint(old)
            assert engine.load_checkpoint(old)[0] == f"{new}/step-00000001"
    return found


@pytest.mark.parametrize("own_root", [True, False])
def test_what_deepspeed_itself_has_saved_is_loaded_where_there_is_nothing_else(
    ranks: RankPool, tmp_path: Path, own_root: bool
) -> None:
    """Another stage, other ranks; what is saved then never mixes with DeepSpeed's own files."""
    old, new = str(tmp_path / "old"), str(tmp_path / "new") if own_root else None
    saved = ranks.run(2, save_as_deepspeed, old, timeout=200)[0]
    for expected, found in zip(saved, ranks.run(3, go_on_from_deepspeed, old, new, timeout=200)[0], strict=True):
        assert same(found, expected)


def test_what_is_not_supported_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, refuse, str(tmp_path), timeout=200)


def save_in_halves(root: str) -> None:
    """A checkpoint of plain training whose weights are bfloat16."""
    model = small_model(4)
    shardckpt.save(f"{root}/step-00000005", {"model": model.bfloat16()})


def load_halves(root: str) -> Any:
    engine = make_engine(2)
    with attach(engine):
        engine.load_checkpoint(root, load_module_only=True)
        found = masters(engine)
        with pytest.raises(MissingNames, match="optimizer/group_of"):
            engine.load_checkpoint(root)
        engine.load_checkpoint(root, load_optimizer_states=False)
    return found, engine.global_steps, engine.global_samples, torch_optimizer(engine).state


def test_weights_of_another_dtype_are_converted(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(1, save_in_halves, str(tmp_path))
    found, steps, samples, state = ranks.run(2, load_halves, str(tmp_path), timeout=200)[1]
    assert found["up.weight"].dtype == torch.float32 and not state
    assert torch.equal(found["up.weight"], small_model(4).up.weight.detach().bfloat16().float())
    assert (steps, samples) == (0, 0)
