# SPDX-License-Identifier: Apache-2.0
"""Whatever training does from the moment that `save` returns, what is saved is the state as of the call, bit for bit."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import shardckpt
from shardckpt import Options
from shardckpt.guard import STEP_GUARD
from tests import models
from tests.engine.guarding import Late, backward
from tests.engine.loops import LOOPS, flatten
from tests.ranks import RankPool


class Saves:
    """A checkpointer, and how it stages."""

    def __init__(self, root: str, mode: str) -> None:
        stage, background, *late = mode.split()
        self.root = root
        self.is_late = bool(late)
        self.steps = itertools.count()
        options = Options(stage=stage, background=background, timeout=60.0)  # type: ignore[arg-type]
        kind = Late if late else shardckpt.Checkpointer
        self.checkpointer = kind(root, options=options)

    def __enter__(self) -> Saves:
        return self

    def __exit__(self, *_: object) -> None:
        # what a test that failed has not waited for would be waited for here for ever
        STEP_GUARD.wait()
        self.checkpointer.close()

    def begin(self, state: dict[str, Any]) -> shardckpt.SaveHandle:
        return self.checkpointer.save(next(self.steps), state)

    def load(self, handle: shardckpt.SaveHandle, into: dict[str, Any] | None = None) -> Any:
        url = handle.result(timeout=60).url
        return shardckpt.load(url, into=into).state

    def blocking(self, state: dict[str, Any]) -> Any:
        return self.load(self.checkpointer.save(next(self.steps), state, wait=True))


FAST = ["eager thread", "lazy thread late"]
SLOW = ["lazy thread", "eager process", "lazy process", "lazy process late"]
MODES = [*FAST, *(pytest.param(mode, marks=pytest.mark.slow) for mode in SLOW)]


@pytest.fixture(scope="module", params=MODES)
def saves(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saves]:
    """One checkpointer for states of many kinds, one after the other."""
    with Saves(str(tmp_path_factory.mktemp("exact")), request.param) as saves:
        yield saves


def differing(found: Any, expected: Any) -> list[str]:
    return models.differences(dict(flatten(found)), dict(flatten(expected)))


def changed_parts(after: Any, before: Any) -> set[str]:
    """First parts of the names of what is not equal."""
    return {re.split("[/:]", name)[0] for name in differing(after, before)}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name.startswith("compiled") else []) for name in LOOPS]
)
def test_the_snapshot_is_the_state_at_the_call(saves: Saves, name: str) -> None:
    torch.manual_seed(0)
    loop = LOOPS[name]()
    loop.train()
    loop.train()
    before = saves.blocking(loop.state)
    weights = {key: value.clone() for key, value in loop.state["model"].state_dict().items()} if "model" in loop.state else {}

    handle = saves.begin(loop.state)
    if saves.is_late and name not in ("without optimizer", "tensors only"):
        assert handle.state == "requested"
    loop.train()
    loop.train()

    found = saves.load(handle)
    assert differing(found, before) == []
    assert models.differences({key: found["model"][key] for key in weights}, weights) == []
    # the loop does change everything
    assert changed_parts(saves.blocking(loop.state), before) == set(loop.state)


def test_every_save_of_many_is_exact(saves: Saves) -> None:
    """Saves in a row, each in the memory of the last one, with steps between them and during them."""
    torch.manual_seed(0)
    loop = LOOPS["large"]()
    loop.train()
    for _ in range(3):
        before = saves.blocking(loop.state)
        handle = saves.begin(loop.state)
        loop.train()
        loop.train()
        assert differing(saves.load(handle), before) == []


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=str)
def test_a_step_at_once_waits_for_all_of_the_copy(saves: Saves, options: dict[str, bool]) -> None:
    weight = nn.Parameter(torch.arange(8e6))
    optimizer = torch.optim.SGD([weight], lr=1.0, **options)
    weight.grad = torch.ones_like(weight)
    handle = saves.begin({"weight": weight, "optimizer": optimizer})
    optimizer.step()
    optimizer.step()
    assert torch.equal(weight.detach(), torch.arange(8e6) - 2)
    assert torch.equal(saves.load(handle)["weight"], torch.arange(8e6))


def test_averages_and_statistics_need_no_wait(saves: Saves) -> None:
    """What changes outside of steps was copied when save returned, although what changes in them may be pending."""
    torch.manual_seed(0)
    loop = LOOPS["foreach"]()
    loop.train()
    before = saves.blocking(loop.state)
    handle = saves.begin(loop.state)
    ema, net, progress = loop.state["ema"], loop.state["model"], loop.state["progress"]
    for _ in range(3):
        ema.update_parameters(net)
        net(torch.randn(8, 4)).sum().backward()
        progress["losses"].clear()
        progress["sum"].fill_(-1)
        progress["rank"].value.fill_(-1)
        loop.state["scheduler"].step()
    if saves.is_late:
        assert handle.state == "requested"
        assert not handle.done()
    STEP_GUARD.wait()
    assert differing(saves.load(handle), before) == []


def test_loads_into_the_state_wait_too(saves: Saves) -> None:
    loop = LOOPS["foreach"]()
    loop.train()
    first = saves.begin(loop.state)
    STEP_GUARD.wait()
    old = saves.load(first)
    loop.train()
    before = saves.blocking(loop.state)
    handle = saves.begin(loop.state)
    shardckpt.load(first.result().url, into=loop.state)
    assert differing(saves.load(handle), before) == []
    assert differing(saves.blocking(loop.state), old) == []


# ---- several ranks


def check_kinds(root: str, mode: str) -> dict[str, list[str]]:
    found = {}
    with Saves(root, mode) as saves:
        for kind in ("ddp", "fsdp2", "tp", "zero"):
            job = models.make_job(kind)
            job.train(2)
            before = copy.deepcopy(models.snapshot(job, with_rng=True))
            handle = saves.begin(job.state())
            # small replicated tensors are all rank 0's to save
            assert handle.state == "requested" or not saves.is_late or dist.get_rank() > 0
            job.train(2)
            changed = models.differences(models.snapshot(job), before)
            assert any(".exp_avg:" in name for name in changed)
            assert any(name.startswith("model.") for name in changed)
            other = models.make_job(kind, seed=1)
            other.train(1)
            saves.load(handle, into=other.state())
            found[kind] = models.differences(models.snapshot(other, with_rng=True), before)
            dist.barrier()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_snapshots_of_parallel_training_are_exact(ranks: RankPool, tmp_path: Path, mode: str) -> None:
    for found in ranks.run(2, check_kinds, str(tmp_path / "c"), mode, timeout=120.0):
        assert found == {"ddp": [], "fsdp2": [], "tp": [], "zero": []}


def check_flat(root: str, mode: str) -> dict[str, list[str]]:
    found = {}
    with Saves(root, mode) as saves:
        for kind in ("fsdp1", "fsdp1 orig"):
            torch.manual_seed(0)
            cpu = torch.device("cpu")
            inner = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
            net = FullyShardedDataParallel(inner, use_orig_params="orig" in kind, device_id=cpu)
            optimizer = torch.optim.AdamW(net.parameters())
            state = {"model": net, "optimizer": optimizer}
            for _ in range(2):
                backward(net)
                optimizer.step()
            before = saves.blocking(state)
            handle = saves.begin(state)
            for _ in range(2):
                backward(net)
                optimizer.step()
            after = saves.blocking(state)
            found[kind] = differing(saves.load(handle), before)
            assert changed_parts(after, before) == set(state)
            dist.barrier()
    return found


@pytest.mark.parametrize("mode", MODES)
def test_snapshots_of_flat_parameters_are_exact(ranks: RankPool, tmp_path: Path, mode: str) -> None:
    for found in ranks.run(2, check_flat, str(tmp_path / "c"), mode, timeout=120.0):
        assert found == {"fsdp1": [], "fsdp1 orig": []}
