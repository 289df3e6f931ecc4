# SPDX-License-Identifier: Apache-2.0
"""A few rounds of launch/soak.sh, and proof that its model notices what must not be."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt
from launch.soak import draw, run_rounds
from launch.soak_jobs import Failed, Plan
from launch.soak_model import Model
from launch.soak_train import ROWS, Content


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_under_torchrun(tmp_path: Path) -> None:
    """On 3, 2 and 1 ranks, of which one dies at some call of its file system."""
    assert run_rounds(16, 3, ["torchrun"], tmp_path) == 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_of_forked_ranks(tmp_path: Path) -> None:
    """Once also with background processes that go on when the next job starts."""
    assert run_rounds(29, 4, ["fork"], tmp_path) == 4


# ---- the model


LEG = 1


def a_plan(**more: Any) -> Plan:
    """One rank that saved steps 1 to 4, two of which are kept."""
    plan = draw(random.Random(0), "fork", None, LEG)
    changes = {"world_size": 1, "columns": 3, "keep_last": 2, "keep_every": None, "survivors": "terminated", "killed": True}
    for name, value in {**changes, **more}.items():
        setattr(plan, name, value)
    return plan


def state_of(plan: Plan, step: int) -> dict[str, Any]:
    """What the job has in that step, as plain tensors."""
    content = Content(plan.seed, plan.columns)
    weight, momentum = content.weight(step), content.momentum(step)
    buffers = {"matrix": {"momentum_buffer": momentum}, "vector": {"momentum_buffer": momentum[0].clone()}}
    return {
        "model": {"matrix": weight, "vector": weight[0].clone()},
        "optimizer": {"state": buffers},
        "mark": torch.full((ROWS,), LEG),
        "own": shardckpt.PerRank(torch.tensor([LEG, step, 0])),
        "step": step,
    }


class World:
    """A root and logs that agree, until a test changes one of them."""

    def __init__(self, path: Path, **more: Any) -> None:
        self.plan = a_plan(**more)
        self.root, self.logs = path / "root", path / "logs"
        self.logs.mkdir()
        self.entries: list[dict[str, Any]] = [{"what": "restored", "step": 0, "leg": 0}]
        with shardckpt.Checkpointer(self.root, keep_last=2) as ckpt:
            for step in (1, 2, 3, 4):
                ckpt.save(step, state_of(self.plan, step), metadata={"leg": LEG}, wait=True)
                self.entries += [{"what": "ask", "step": step}, {"what": "durable", "step": step}]

    def check(self) -> str:
        """What the model says of it."""
        (self.logs / f"leg-{LEG:03}-rank-0.log").write_text("".join(json.dumps(entry) + "\n" for entry in self.entries))
        model = Model(self.plan, self.root)
        model.read_logs(self.plan, self.logs)
        return model.check(self.plan)


def remove(step: int) -> Callable[[World], None]:
    return lambda world: shutil.rmtree(world.root / f"step-{step:08}")


def forget_to_ask(world: World) -> None:
    world.entries = [entry for entry in world.entries if entry != {"what": "ask", "step": 4}]


def save(step: int, content_of: int) -> Callable[[World], None]:
    def change(world: World) -> None:
        world.entries.append({"what": "ask", "step": step})
        with shardckpt.Checkpointer(world.root) as ckpt:
            ckpt.save(step, state_of(world.plan, content_of) | {"step": step}, metadata={"leg": LEG}, wait=True)

    return change


def log(**entry: Any) -> Callable[[World], None]:
    return lambda world: world.entries.append(entry)


def let_nobody_die(world: World) -> None:
    world.plan.killed = False
    world.entries.append({"what": "failed", "step": 5, "error": "RankTimeout", "message": "..."})


def test_the_model_is_content_with_what_may_be(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert world.check() == "4 steps reported durable, 2 there and intact (newest: 3, 4)"
    save(5, 5)(world)
    # committed, but nobody was told before the end: then it was not pruned either
    assert world.check() == "4 steps reported durable, 3 there and intact (newest: 3, 4, 5)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove(4), "step 4 is gone, and must not be"),
        (remove(3), "step 3 is gone, and must not be"),
        (forget_to_ask, r"step 4 of start 1 is committed, but only ranks \[\] were about to save it"),
        (save(5, 4), r"step 5 of start 1 holds other values in \['matrix', 'vector', 'momentum'"),
        (save(2, 2), r"steps \[2\] are expired, and are still there after step 4 was reported durable"),
        (log(what="restored", step=2, leg=1), "ranks restored different checkpoints"),
        (log(what="wrong", step=2, names=["matrix"]), r"rank 0 restored \['matrix'\] of step 2 with other values"),
        (log(what="crashed", error="ChecksumMismatch", message="flipped"), "rank 0 ended by ChecksumMismatch: flipped"),
        (log(what="failed", step=5, error="StateChanged", message="why"), "the save of step 5 failed by StateChanged: why"),
        (let_nobody_die, "the save of step 5 failed by RankTimeout"),
    ],
)
def test_the_model_notices(tmp_path: Path, change: Callable[[World], None], message: str) -> None:
    world = World(tmp_path)
    change(world)
    with pytest.raises(Failed, match=message):
        world.check()


def test_the_model_notices_a_job_that_resumes_from_too_far_back(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.check()
    model = Model(world.plan, world.root)
    model.read_logs(world.plan, world.logs)
    world.plan.leg = 2
    (world.logs / "leg-002-rank-0.log").write_text(json.dumps({"what": "restored", "step": 3, "leg": LEG}))
    with pytest.raises(Failed, match="step 3 was restored, although step 4 was reported durable"):
        model.read_logs(world.plan, world.logs)
