# SPDX-License-Identifier: Apache-2.0
"""What may be visible in a root whose jobs are killed, as far as their logs tell."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import torch

import shardckpt
from launch.soak_jobs import Failed, Plan
from launch.soak_train import ROWS, Content

EXPECTED_FAILURES = {"RankTimeout", "RankFailed", "CoordinationError", "BackgroundDied", "AlreadyCommitted"}


class Model:
    """Which steps may be committed, by which start of the job, and which have to be."""

    def __init__(self, plan: Plan, root: Path) -> None:
        self.root = root
        self.retention = shardckpt.Retention(keep_last=plan.keep_last, keep_every=plan.keep_every)
        self.content = Content(plan.seed, plan.columns)
        self.world_sizes: dict[int, int] = {}
        """Ranks, by start."""
        self.asked: dict[tuple[int, int], set[int]] = defaultdict(set)
        """By step and start: ranks that were about to save."""
        self.durable: dict[int, int] = {}
        """Steps that somebody was told are durable, and the start in which."""
        self.finished: dict[int, int] = {}
        """Those of which rank 0 was told, which prunes before it is."""
        self.seen: list[int] = []
        """Steps that were there at the last look."""
        self.looked_after = 0
        """The start after which that was; 0 before the first."""

    def __str__(self) -> str:
        asked = {f"step {step} of start {leg}": sorted(ranks) for (step, leg), ranks in self.asked.items()}
        return f"asked for {asked}; durable {self.durable}; at the last look {self.seen}; {self.retention}"

    def read_logs(self, plan: Plan, logs: Path) -> None:
        """Take in what all ranks of one start have written; raises `Failed` for what is wrong by itself."""
        self.world_sizes[plan.leg] = plan.world_size
        restored = set()
        promised = max(self.durable, default=0)
        for rank in range(plan.world_size):
            path = logs / f"leg-{plan.leg:03}-rank-{rank}.log"
            lines = path.read_text().splitlines() if path.exists() else []
            for entry in map(json.loads, lines):
                match entry["what"]:
                    case "ask":
                        self.asked[entry["step"], plan.leg].add(rank)
                    case "durable":
                        self.durable[entry["step"]] = plan.leg
                        if rank == 0:
                            self.finished[entry["step"]] = plan.leg
                    case "restored":
                        restored.add((entry["step"], entry["leg"]))
                    case "failed":
                        self._check_failure(plan, entry)
                    case "crashed":
                        raise Failed(f"rank {rank} ended by {entry['error']}: {entry['message']}")
                    case "wrong":
                        raise Failed(f"rank {rank} restored {entry['names']} of step {entry['step']} with other values")
        self._check_restored(plan, restored, promised)

    def _check_failure(self, plan: Plan, entry: dict[str, object]) -> None:
        """Without a death there is no reason for one, but for those of the start before that are still at it."""
        if entry["error"] not in EXPECTED_FAILURES or (not plan.may_fail and entry["error"] != "AlreadyCommitted"):
            raise Failed(f"the save of step {entry['step']} failed by {entry['error']}: {entry['message']}")

    def _check_restored(self, plan: Plan, restored: set[tuple[int, int]], promised: int) -> None:
        if len(restored) > 1:
            raise Failed(f"ranks restored different checkpoints: {sorted(restored)}")
        for step, leg in restored:
            if step < promised:
                raise Failed(f"step {step} was restored, although step {promised} was reported durable")
            if step:
                self._require_asked(step, leg)
            if self.looked_after == plan.leg - 1 and step != max(self.seen, default=0):
                raise Failed(f"step {step} was restored, and the newest is {max(self.seen, default=0)}")

    def _require_asked(self, step: int, leg: int) -> None:
        ranks = self.asked.get((step, leg), set())
        if len(ranks) != self.world_sizes.get(leg):
            raise Failed(f"step {step} of start {leg} is committed, but only ranks {sorted(ranks)} were about to save it")

    def check(self, plan: Plan) -> str:
        """Load all that is there, now that nobody writes any more; raises `Failed`, or returns a line about it."""
        with shardckpt.Checkpointer(self.root) as ckpt:
            steps = ckpt.steps()
        for step in steps:
            self._check_content(step)
        self._check_kept(steps)
        told = sum(1 for leg in self.durable.values() if leg == plan.leg)
        last = steps[-1] if steps else 0
        if (
            self.looked_after == plan.leg - 1
            and self.durable.get(last) == plan.leg
            and (expired := self.retention.expired(steps))
        ):
            raise Failed(f"steps {expired} are expired, and are still there after step {last} was reported durable: {steps}")
        self.seen, self.looked_after = steps, plan.leg
        shown = ", ".join(map(str, steps[-4:])) or "none"
        return f"{told} steps reported durable, {len(steps)} there and intact (newest: {shown})"

    def _check_content(self, step: int) -> None:
        restored = shardckpt.load(self.root / f"step-{step:08}")
        state, leg = restored.state, restored.info.metadata["leg"]
        self._require_asked(step, leg)
        if restored.info.world_size != self.world_sizes[leg] or self.durable.get(step, leg) != leg:
            raise Failed(
                f"step {step} says that start {leg} saved it on {restored.info.world_size} ranks; "
                f"reported durable by start {self.durable.get(step)}"
            )
        weight, momentum = self.content.weight(step), self.content.momentum(step)
        buffers = state["optimizer"]["state"]
        pairs = {
            "matrix": (state["model"]["matrix"], weight),
            "vector": (state["model"]["vector"], weight[0]),
            "momentum": (buffers["matrix"]["momentum_buffer"], momentum),
            "vector momentum": (buffers["vector"]["momentum_buffer"], momentum[0]),
            "mark": (state["mark"], torch.full((ROWS,), leg)),
            "step": (torch.tensor(state["step"]), torch.tensor(step)),
        }
        for rank in range(restored.info.world_size):
            pairs[f"own part of rank {rank}"] = (state["own"][rank], torch.tensor([leg, step, rank]))
        wrong = [name for name, (found, expected) in pairs.items() if not torch.equal(found, expected)]
        if wrong:
            raise Failed(f"step {step} of start {leg} holds other values in {wrong}")

    def _check_kept(self, steps: list[int]) -> None:
        """A step that was there once may only be gone when as many newer ones are as are to be kept."""
        last, every = self.retention.keep_last, self.retention.keep_every
        for step in sorted({*self.durable, *self.seen} - set(steps), reverse=True):
            newer = sum(1 for other in steps if other > step)
            if last is None or newer < last or (every is not None and step % every == 0):
                raise Failed(f"step {step} is gone, and must not be: there are {steps}, kept are {self.retention}")
