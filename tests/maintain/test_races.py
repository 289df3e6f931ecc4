# SPDX-License-Identifier: Apache-2.0
"""Prune beside saves, loads, listings, verification and other prunes: all that one does happens between any two calls that the
other makes to the store.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import shardckpt
from shardckpt.errors import CheckpointNotFound, CheckpointRemoved
from shardckpt.maintain.listing import list_steps
from shardckpt.maintain.stored import committed_prefixes, open_checkpoint
from shardckpt.maintain.verify import verify
from shardckpt.manifest import rank_file_name, step_directory
from shardckpt.options import Retention
from shardckpt.pruning import Pruner
from shardckpt.root import Root
from shardckpt.store import MemoryStore, Store
from tests.maintain.hooks import Interrupted, checkpointer_on
from tests.store.helpers import names

DEAD = "dead" * 4

_numbers = itertools.count()


def a_state(step: int) -> dict[str, Any]:
    return {"t": torch.full((300,), float(step)), "own": shardckpt.PerRank({"step": step}), "step": step}


def make(*steps: int, dead: int | None = None) -> str:
    """A space with committed steps, and perhaps a dead attempt at one; its name."""
    name = f"races-{next(_numbers)}"
    with checkpointer_on(MemoryStore(name)) as ckpt:
        for step in steps:
            ckpt.save(step, a_state(step), wait=True)
    if dead is not None:
        old = MemoryStore(name, lambda: 1.0)
        for rank in range(2):
            old.put_if_absent(f"{step_directory(dead)}/{rank_file_name(rank, DEAD)}", b"x")
    return name


def prune(store: Store, keep_last: int = 1) -> None:
    pruner = Pruner(store)
    for removal in pruner.plan(Root(store).look(), Retention(keep_last=keep_last), dead_before=1000.0):
        pruner.remove(removal)


def save(store: Store, step: int, keep_last: int | None = None) -> None:
    with checkpointer_on(store, keep_last=keep_last) as ckpt:
        ckpt.save(step, a_state(step), wait=True)


def saved_steps(store: Store) -> list[int]:
    """The committed steps; each of them is whole, with the values of its save."""
    steps = Root(store).steps()
    for step in steps:
        target = a_state(0)
        with checkpointer_on(store) as ckpt:
            restored = ckpt.restore(target, step=step)
        assert restored is not None
        assert target["step"] == step
        assert target["t"].tolist() == [float(step)] * 300
    return steps


def everywhere(make_space: Callable[[], str], act: Callable[[Store], object], other: Callable[[Store], object]) -> list[str]:
    """Let ``act`` be interrupted by ``other`` before each of its calls in turn; the spaces that are left."""
    store = Interrupted(make_space())
    act(store)
    assert store.calls > 3
    spaces = []
    for at in range(store.calls):
        space = make_space()
        act(Interrupted(space, at, lambda space=space: other(MemoryStore(space))))  # type: ignore[misc]
        spaces.append(space)
    return spaces


def only_committed(space: str) -> None:
    """Nothing is there but committed steps."""
    store = MemoryStore(space)
    wanted = []
    for prefix in committed_prefixes(store):
        files = open_checkpoint(store, prefix).checkpoint.manifest.files
        wanted += [f"{prefix}{leaf}" for leaf in ("manifest.json", *(file.name for file in files))]
    assert names(store) == sorted(wanted)


def test_two_prunes() -> None:
    for space in everywhere(lambda: make(1, 2, 3, dead=1), prune, prune):
        assert saved_steps(MemoryStore(space)) == [3]
        only_committed(space)
    for space in everywhere(lambda: make(1, 2, 3, dead=3), prune, lambda store: prune(store, keep_last=2)):
        assert saved_steps(MemoryStore(space)) == [3]
        only_committed(space)


def test_a_prune_while_a_save_comes() -> None:
    """A new step; and the one of which there is a dead attempt."""
    for step, dead in ((9, 8), (8, 8)):
        for space in everywhere(lambda dead=dead: make(1, 2, dead=dead), prune, lambda store, step=step: save(store, step)):  # type: ignore[misc]
            store = MemoryStore(space)
            assert saved_steps(store) in ([2, step], [step])
            prune(store)
            assert saved_steps(store) == [step]
            only_committed(space)


def test_a_save_while_a_prune_comes() -> None:
    for step, dead in ((9, 8), (8, 8)):
        for space in everywhere(lambda dead=dead: make(1, 2, dead=dead), lambda store, step=step: save(store, step), prune):  # type: ignore[misc]
            assert step in saved_steps(MemoryStore(space))
            prune(MemoryStore(space))
            assert saved_steps(MemoryStore(space)) == [step]
            only_committed(space)


def test_two_runs_that_keep_one_step_each() -> None:
    """They prune after their commits, each what the other has saved."""
    for space in everywhere(lambda: make(1, 2), lambda store: save(store, 7, 1), lambda store: save(store, 8, 1)):
        assert saved_steps(MemoryStore(space))[-1] == 8
        assert set(saved_steps(MemoryStore(space))) <= {7, 8}


def replace_newest(store: Store) -> None:
    save(store, 5)
    prune(store)


def test_a_restore_goes_on_to_the_newer_step() -> None:
    def restore(store: Store) -> None:
        target = a_state(0)
        with checkpointer_on(store) as ckpt:
            restored = ckpt.restore(target)
        assert restored is not None
        found.append(restored.step)
        assert target["t"].tolist() == [float(restored.step)] * 300
        assert target["step"] == restored.step
        assert [name for name in names(store) if name.startswith(".restores")] == []

    found: list[int] = []
    everywhere(lambda: make(1, 2), restore, replace_newest)
    # without interruption, before the choice, after it, and after the last file was opened
    assert found[:2] == [2, 5]
    assert set(found) == {2, 5}
    assert found.count(5) >= 4


@pytest.mark.parametrize("fallback", [False, True])
def test_a_restore_of_a_step_that_is_removed_says_so(fallback: bool) -> None:
    def restore(store: Store) -> None:
        target = a_state(0)
        with checkpointer_on(store) as ckpt:
            try:
                assert ckpt.restore(target, step=2, fallback=fallback) is not None
                outcomes.append("restored")
                assert target["t"].tolist() == [2.0] * 300
            except CheckpointRemoved as error:
                outcomes.append("removed")
                assert "step-00000002 was removed while it was read" in error.message
            except CheckpointNotFound as error:
                outcomes.append("not found")
                assert error.steps == [5]
        assert [name for name in names(store) if name.startswith(".restores")] == []

    outcomes: list[str] = []
    everywhere(lambda: make(1, 2), restore, replace_newest)
    assert outcomes[:2] == ["restored", "not found"]
    assert outcomes.count("removed") >= 3


def test_a_step_of_which_only_a_file_is_gone_was_not_removed() -> None:
    space = make(1, 2)
    directory = f"{space}/{step_directory(2)}"
    store = MemoryStore(directory)
    store.delete(rank_file_name(0, open_checkpoint(store).checkpoint.manifest.attempt))
    with pytest.raises(shardckpt.MissingFile, match="the manifest names it as the file of rank 0"):
        shardckpt.load(f"memory://{directory}")
    assert list_steps(MemoryStore(space))[1].state == "damaged"


def test_a_root_that_is_emptied_is_not_taken_for_a_new_one() -> None:
    def restore(store: Store) -> None:
        with checkpointer_on(store) as ckpt:
            try:
                outcomes.append(ckpt.restore(a_state(0)) is not None)
            except CheckpointRemoved:
                outcomes.append(None)

    def empty(store: Store) -> None:
        for name in names(store):
            store.delete(name)

    outcomes: list[bool | None] = []
    everywhere(lambda: make(2), restore, empty)
    # nothing was there; and something was, which is gone
    assert outcomes[:2] == [True, False]
    assert outcomes.count(False) == 1
    assert outcomes.count(None) >= 3


def test_a_listing_shows_steps_that_come_and_go_but_no_damage() -> None:
    def listing(store: Store) -> None:
        found = {listed.step: listed.state for listed in list_steps(store)}
        shown.append(found)
        assert "damaged" not in found.values()
        assert {2, 5} & set(found)

    shown: list[dict[int | None, Any]] = []
    everywhere(lambda: make(1, 2, dead=1), listing, replace_newest)
    assert {1: "committed", 2: "committed"} in shown
    assert {5: "committed"} in shown


def test_a_step_that_is_half_removed_is_listed_as_that() -> None:
    store = MemoryStore(make(1, 2))
    attempt = open_checkpoint(store, "step-00000001/").checkpoint.manifest.attempt
    store.put_if_absent(f"step-00000001/removing-{attempt}.tmp", b"")
    assert [(listed.state, listed.problem) for listed in list_steps(store)] == [("committed", None)] * 2
    store.delete("step-00000001/manifest.json")
    half, _ = list_steps(store)
    assert half.state == "incomplete"
    assert half.problem == "it was being removed, and that was not finished; prune does that"


def test_verification_finds_no_damage_in_what_is_removed() -> None:
    def check(store: Store) -> None:
        found = list(verify(store, read_data=True))
        assert all(verification.ok for verification in found)
        counts.append(sum(verification.removed for verification in found))

    counts: list[int] = []
    everywhere(lambda: make(1, 2), check, replace_newest)
    assert counts[0] == 0
    assert max(counts) == 2
