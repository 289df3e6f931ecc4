# SPDX-License-Identifier: Apache-2.0
"""Any order of saves, restores, crashes and reopenings: a Checkpointer does what a dictionary by step would."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import shardckpt
from shardckpt.errors import AlreadyCommitted, CheckpointNotFound, UnsupportedLeaf
from shardckpt.manifest import MANIFEST_NAME, step_directory
from shardckpt.store import MemoryStore

_numbers = itertools.count()
STEPS = st.integers(0, 12)


class Steps(RuleBasedStateMachine):
    """``committed`` is what has to be there: the number saved, by step."""

    @initialize(keep_last=st.none() | st.integers(1, 4), keep_every=st.none() | st.integers(1, 4))
    def open(self, keep_last: int | None, keep_every: int | None) -> None:
        self.url = f"memory://machine-{next(_numbers)}"
        self.store = MemoryStore(self.url.removeprefix("memory://"))
        self.committed: dict[int, int] = {}
        self.count = 0
        self.options: dict[str, Any] = {"keep_last": keep_last, "keep_every": keep_every if keep_last else None}
        self.ckpt = shardckpt.Checkpointer(self.url, **self.options)

    def state(self, number: int, width: int = 3) -> dict[str, Any]:
        return {"t": torch.full((width,), float(number)), "number": number}

    @rule(step=STEPS, width=st.sampled_from([3, 3, 3, 4]))
    def save(self, step: int, width: int) -> None:
        self.count += 1
        if step in self.committed:
            with pytest.raises(AlreadyCommitted):
                self.ckpt.save(step, self.state(self.count), wait=True)
            return
        self.ckpt.save(step, self.state(self.count, width), wait=True)
        self.committed[step] = self.count
        keep_last, keep_every = self.options["keep_last"], self.options["keep_every"]
        if keep_last is not None:
            recent = sorted(self.committed)[-keep_last:]
            kept = [s for s in self.committed if s in recent or s == step or (keep_every and s % keep_every == 0)]
            self.committed = {s: self.committed[s] for s in kept}

    @rule(step=STEPS)
    def fail(self, step: int) -> None:
        with pytest.raises((UnsupportedLeaf, AlreadyCommitted)):
            self.ckpt.save(step, {"f": print}, wait=True)

    @rule(step=STEPS)
    def crash(self, step: int) -> None:
        """As if a save had been killed before its commit, or a prune in the middle."""
        self.store.delete(f"{step_directory(step)}/{MANIFEST_NAME}")
        self.committed.pop(step, None)

    @rule()
    def reopen(self) -> None:
        self.ckpt.close()
        self.ckpt = shardckpt.Checkpointer(self.url, **self.options)

    @rule(step=st.none() | STEPS)
    def restore(self, step: int | None) -> None:
        newest = max(self.committed, default=None)
        wanted = newest if step is None else step
        target: dict[str, Any] = {"number": 0}
        if step is not None and step not in self.committed:
            with pytest.raises(CheckpointNotFound):
                self.ckpt.restore(target, step=step)
        elif wanted is None:
            assert self.ckpt.restore(target) is None
        else:
            restored = self.ckpt.restore(target, step=step)
            assert restored is not None
            assert (restored.step, target["number"]) == (wanted, self.committed[wanted])

    @invariant()
    def steps_are_those_committed(self) -> None:
        if hasattr(self, "ckpt"):
            assert self.ckpt.steps() == sorted(self.committed)

    def teardown(self) -> None:
        if not hasattr(self, "ckpt"):
            return
        for step, number in self.committed.items():
            loaded = shardckpt.load(f"{self.url}/{step_directory(step)}").state
            assert loaded["number"] == number
            assert (loaded["t"] == number).all()
        self.ckpt.close()


TestSteps = Steps.TestCase
TestSteps.settings = settings(max_examples=40, stateful_step_count=30)
