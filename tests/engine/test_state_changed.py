# SPDX-License-Identifier: Apache-2.0
"""A state that is changed while a save still needs it makes the save fail on all ranks, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardckpt
from shardckpt import Options, SaveDropped, StateChanged
from shardckpt.guard import STEP_GUARD
from tests.engine.guarding import Late, Net, backward
from tests.ranks import RankPool


def a_state(**options: Any) -> tuple[Net, torch.optim.Optimizer, dict[str, Any]]:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, **options)
    backward(net)
    optimizer.step()
    return net, optimizer, {"model": net, "optimizer": optimizer}


@torch.no_grad()
def scale(net: nn.Module) -> None:
    for param in net.parameters():
        param.mul_(0.5)


@torch.no_grad()
def swap_in_averages(net: nn.Module) -> None:
    """As libraries for averages of weights do it."""
    for param in net.parameters():
        param.data.copy_(torch.ones_like(param))


def load_other_weights(net: nn.Module) -> None:
    net.load_state_dict(Net().state_dict())


CHANGES = [scale, swap_in_averages, load_other_weights]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_before_the_copy_makes_the_save_fail(tmp_path: Path, change: Callable[[nn.Module], None]) -> None:
    net, optimizer, state = a_state()
    with Late(tmp_path, options=Options(stage="lazy")) as ckpt:
        first = ckpt.save(1, state)
        optimizer.step()
        first.result(timeout=60)
        weight = net.first.weight.detach().clone()
        handle = ckpt.save(2, state)
        change(net)
        optimizer.step()
        with pytest.raises(StateChanged, match=r"wait_staged\(\)") as caught:
            handle.result(timeout=60)
        assert handle.state == "failed"
        assert "model/first.weight" in caught.value.names
        assert ckpt.steps() == [1]
        last = ckpt.save(3, state)
        optimizer.step()
        last.result(timeout=60)
        assert ckpt.steps() == [1, 3]
        assert not torch.equal(shardckpt.load(tmp_path / "step-00000003").state["model"]["first.weight"], weight)


def test_what_is_changed_after_the_copy_was_waited_for_is_exact(tmp_path: Path) -> None:
    net, _, state = a_state()
    with shardckpt.Checkpointer(tmp_path, options=Options(stage="lazy")) as ckpt:
        before = {name: value.clone() for name, value in net.state_dict().items()}
        handle = ckpt.save(1, state)
        handle.wait_staged(timeout=60)
        swap_in_averages(net)
        handle.result(timeout=60)
    loaded = shardckpt.load(tmp_path / "step-00000001").state["model"]
    assert all(torch.equal(loaded[name], value) for name, value in before.items())


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_who_promised_not_to_change_the_state_and_does_gets_no_checkpoint(tmp_path: Path, options: dict[str, bool]) -> None:
    large = nn.Parameter(torch.ones(16 << 20))
    optimizer = torch.optim.SGD([large], lr=0.1, **options)
    large.grad = torch.ones_like(large)
    state = {"large": large, "optimizer": optimizer}
    with shardckpt.Checkpointer(tmp_path, options=Options(stage="none")) as ckpt:
        ckpt.save(1, state).result(timeout=60)
        handle = ckpt.save(2, state)
        optimizer.step()
        assert not handle.done()
        with pytest.raises(StateChanged, match="'large' was changed"):
            handle.result(timeout=60)
        assert ckpt.steps() == [1]


def test_a_save_that_is_replaced_before_it_is_copied_leaves_the_next_one_whole(tmp_path: Path) -> None:
    net, optimizer, state = a_state()
    with Late(tmp_path, options=Options(stage="lazy", when_busy="replace")) as ckpt:
        first = ckpt.save(1, state)
        scale(net)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        second = ckpt.save(2, state)
        with pytest.raises(SaveDropped):
            first.result(timeout=60)
        backward(net)
        optimizer.step()
        second.result(timeout=60)
        assert ckpt.steps() == [2]
    loaded = shardckpt.load(tmp_path / "step-00000002").state["model"]
    assert all(torch.equal(loaded[name], value) for name, value in before.items())


def change_on_one_rank(root: str) -> tuple[list[str], list[int]]:
    torch.manual_seed(0)
    net, _, state = a_state()
    with Late(root, options=Options(stage="lazy", timeout=60.0)) as ckpt:
        handle = ckpt.save(1, state)
        if dist.get_rank() == 0:  # which saves small tensors for all
            scale(net)
        STEP_GUARD.wait()
        with pytest.raises(StateChanged) as caught:
            handle.result(timeout=60)
        dist.barrier()
        return sorted(caught.value.names), ckpt.steps()


def test_a_change_on_one_rank_is_an_error_on_all(ranks: RankPool, tmp_path: Path) -> None:
    for names, steps in ranks.run(2, change_on_one_rank, str(tmp_path / "c")):
        assert {"model/first.weight", "model/second.bias"} <= set(names)
        assert steps == []
