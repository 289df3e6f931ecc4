# SPDX-License-Identifier: Apache-2.0
"""A save looks for memory errors before anything is taken from the state, and again when everything was."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import pytest
import torch

import shardckpt
from shardckpt.coordinate import Coordinator
from shardckpt.errors import DeviceMemoryError
from shardckpt.gpu import MemoryErrorGuard
from shardckpt.options import Options
from shardckpt.root import Root
from shardckpt.saving import Saver
from shardckpt.store import MemoryStore


class Looks(MemoryErrorGuard):
    """Finds errors at the looks with these numbers."""

    def __init__(self, *bad: int) -> None:
        self.starts = 0
        super().__init__()
        self.bad = bad
        self.seen: list[tuple[int, str, set[torch.device]]] = []

    def start_anew(self) -> None:
        super().start_anew()
        self.starts += 1

    def require_sound(self, rank: int, policy: Literal["refuse", "warn"], devices: Iterable[torch.device]) -> None:
        self.seen.append((rank, policy, set(devices)))
        if len(self.seen) in self.bad:
            raise DeviceMemoryError("damaged", rank=rank, gpus=[])


def save(guard: MemoryErrorGuard, store: MemoryStore, policy: Literal["refuse", "warn"] = "refuse") -> None:
    with Coordinator.connect() as coordinator:
        state = {"t": torch.ones(3), "n": 1}
        Saver(coordinator, store, Options(on_memory_errors=policy), guard).save("step-00000001/", 1, state, {})


@pytest.mark.parametrize("policy", ["refuse", "warn"])
def test_a_save_looks_twice(policy: Literal["refuse", "warn"]) -> None:
    guard, store = Looks(), MemoryStore(f"looks-twice-{policy}")
    save(guard, store, policy)
    assert guard.seen == [(0, policy, {torch.device("cpu")})] * 2
    assert Root(store).steps() == [1]


@pytest.mark.parametrize("bad", [1, 2])
def test_nothing_is_committed_of_what_may_be_damaged(bad: int) -> None:
    store = MemoryStore(f"looks-bad-{bad}")
    with pytest.raises(DeviceMemoryError):
        save(Looks(bad), store)
    assert Root(store).steps() == []
    assert not store.list()
    save(Looks(), store)
    assert Root(store).steps() == [1]


def test_a_restore_ends_a_refusal_unless_it_leaves_something_out(tmp_path: Path) -> None:
    state = {"t": torch.ones(3), "n": 1}
    with shardckpt.Checkpointer(tmp_path) as ckpt:
        ckpt._saver.memory_errors = guard = Looks()
        assert ckpt.restore(state) is None
        ckpt.save(1, state, wait=True)
        ckpt.restore(state, keys=["t"])
        assert guard.starts == 1
        ckpt.restore(state)
        assert guard.starts == 2
