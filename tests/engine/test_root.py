# SPDX-License-Identifier: Apache-2.0
"""Roots: which steps are committed, which may go, and places that are something else."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.errors import CheckpointNotFound, ConfigError, NotACheckpointRoot
from shardckpt.manifest import MANIFEST_NAME, rank_file_name, step_directory
from shardckpt.options import Options, Retention
from shardckpt.pruning import Pruner
from shardckpt.root import Root, find_checkpoint
from shardckpt.store import MemoryStore

_numbers = itertools.count()
FILE = rank_file_name(0, "0123456789abcdef")


def store_with(*names: str) -> MemoryStore:
    store = MemoryStore(f"root-{next(_numbers)}")
    for name in names:
        store.put_if_absent(name, b"x")
    return store


def step_names(steps: Iterable[int], *, committed: bool = True) -> list[str]:
    leaves = [FILE, MANIFEST_NAME] if committed else [FILE]
    return [f"{step_directory(step)}/{leaf}" for step in steps for leaf in leaves]


def left(store: MemoryStore) -> list[str]:
    return [entry.name for entry in store.list()]


def test_steps_are_those_with_a_manifest_by_number() -> None:
    store = store_with(*step_names([100, 3, 10**17]), *step_names([50], committed=False), "notes.txt", "logs/step-1/x")
    root = Root(store)
    assert root.steps() == [3, 100, 10**17]
    assert [(found.step, found.committed, found.nbytes) for found in root.scan()] == [
        (3, True, 2),
        (50, False, 1),
        (100, True, 2),
        (10**17, True, 2),
    ]


@pytest.mark.parametrize(
    "name",
    [
        "step-3/manifest.json",
        "step-000000003/manifest.json",
        "Step-00000003/manifest.json",
        "step-00000003/sub/manifest.json",
        "step-00000003",
        "manifest.json",
        "step-00000003/manifest.json.bak",
        "old/step-00000003/manifest.json",
    ],
)
def test_other_names_are_no_steps(name: str) -> None:
    assert Root(store_with(name)).steps() == []


# ---- where a checkpoint may go


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([], id="nothing"),
        pytest.param(step_names([1]), id="a step"),
        pytest.param(step_names([1], committed=False), id="an attempt"),
        pytest.param([*step_names([5]), "notes.txt", "tensorboard/events"], id="a step and other things"),
        pytest.param([".hidden", ".git/config"], id="hidden files"),
    ],
)
def test_roots(names: list[str]) -> None:
    Root(store_with(*names)).require_place("step-00000009/")


@pytest.mark.parametrize(
    ("names", "found"),
    [
        pytest.param(["notes.txt"], "notes.txt", id="another file"),
        pytest.param(["src/main.py", "README"], "README", id="a project"),
    ],
)
def test_places_that_are_no_roots(names: list[str], found: str) -> None:
    with pytest.raises(NotACheckpointRoot, match=r"which is no step\. Use a new or an empty directory") as caught:
        Root(store_with(*names)).require_place("step-00000009/")
    assert caught.value.found == found


@pytest.mark.parametrize(
    "names", [[MANIFEST_NAME, FILE], ["a.txt", MANIFEST_NAME, "notes.txt"]], ids=["alone", "beside others"]
)
def test_a_checkpoint_is_no_root(names: list[str]) -> None:
    with pytest.raises(NotACheckpointRoot, match=r"is itself a checkpoint, .* or take shardckpt\.load") as caught:
        Root(store_with(*names)).require_place("step-00000009/")
    assert caught.value.found == MANIFEST_NAME


@pytest.mark.parametrize("names", [[], [FILE], [MANIFEST_NAME, FILE]], ids=["nothing", "an attempt", "a checkpoint"])
def test_places_for_one_checkpoint(names: list[str]) -> None:
    Root(store_with(*names)).require_place("")


@pytest.mark.parametrize("names", [["notes.txt"], step_names([1])], ids=["another file", "a root"])
def test_places_that_are_not_for_one_checkpoint(names: list[str]) -> None:
    with pytest.raises(NotACheckpointRoot, match="no part of this checkpoint"):
        Root(store_with(*names)).require_place("")


def test_a_checkpoint_is_found_at_a_place_or_below_a_root() -> None:
    assert find_checkpoint(store_with(MANIFEST_NAME)) == ""
    assert find_checkpoint(store_with(*step_names([3, 20]), *step_names([30], committed=False))) == "step-00000020/"
    for names in ([], ["notes.txt"], step_names([1], committed=False)):
        with pytest.raises(CheckpointNotFound, match="no committed checkpoint in memory://"):
            find_checkpoint(store_with(*names))


# ---- what is kept


@given(
    st.lists(st.integers(0, 60), unique=True, min_size=1, max_size=20),
    st.none() | st.integers(1, 8),
    st.none() | st.integers(1, 8),
    st.sets(st.integers(0, 60), max_size=3),
)
def test_retention(steps: list[int], keep_last: int | None, keep_every: int | None, protected: set[int]) -> None:
    retention = Retention(keep_last=keep_last, keep_every=keep_every if keep_last else None)
    store = store_with(*step_names(steps))
    root, pruner = Root(store), Pruner(store)
    plan = pruner.plan(root.look(), retention, protected=protected)
    assert all(pruner.remove(removal) for removal in plan)
    expected = []
    for at, step in enumerate(sorted(steps, reverse=True)):
        recent = keep_last is None or at < keep_last
        periodic = keep_last is not None and keep_every is not None and step % keep_every == 0
        if recent or periodic or step in protected:
            expected.append(step)
    assert root.steps() == sorted(expected)
    assert max(steps) in expected
    assert left(store) == sorted(step_names(expected))
    assert {removal.step for removal in plan} == set(steps) - set(expected)
    assert pruner.plan(root.look(), retention, protected=protected) == []


# ---- options


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_last": 0}, "keep_last=0 is not an int of at least 1"),
        ({"keep_last": -1}, "keep_last=-1"),
        ({"keep_last": True}, "keep_last=True"),
        ({"keep_last": 2.0}, "keep_last=2.0"),
        ({"keep_last": 1, "keep_every": 0}, "keep_every=0"),
        ({"keep_every": 5}, "keep_every has no effect without keep_last"),
    ],
)
def test_bad_retention_is_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Retention(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"timeout": 0}, "timeout=0 is not a number of seconds above 0; the default is 600"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"timeout": float("inf")}, "timeout=inf"),
        ({"timeout": "60"}, "timeout='60'"),
        ({"grace": 0}, "grace=0 is not a number of seconds above 0; the default is 86400, a day"),
        ({"grace": True}, "grace=True"),
        ({"grace": float("nan")}, "grace=nan"),
        ({"workers": 0}, "workers=0 is not an int from 1 to 4"),
        ({"workers": 5}, "within 64 MiB per rank"),
        ({"workers": 2.5}, "workers=2.5"),
        ({"read_once": "sometimes"}, "read_once='sometimes' is not one of 'auto', 'always' and 'never'"),
    ],
)
def test_bad_options_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Options(**fields)  # type: ignore[arg-type]


def test_options_cannot_be_changed() -> None:
    options = Options()
    with pytest.raises(AttributeError):
        options.workers = 4  # type: ignore[misc]
    assert options == Options(timeout=600.0, workers=3, read_once="auto")
