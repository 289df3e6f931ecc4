# SPDX-License-Identifier: Apache-2.0
"""Names of leaves, trees from names, and the index of what is stored."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.errors import InvalidManifest, StateError
from shardckpt.layout import Mesh, MeshLayout, Replicate
from shardckpt.tree import StoredIndex, StoredTensor, child, split, unflatten
from shardckpt.values import Container

KEYS = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=8)
TREES = st.recursive(st.integers(), lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=3), max_leaves=10).filter(
    lambda tree: isinstance(tree, dict)
)


def flatten(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, item in tree.items():
        name = child(path, key)
        leaves |= flatten(item, name) if isinstance(item, dict) else {name: item}
    return leaves


@given(TREES)
def test_trees_come_back_from_their_names(tree: dict[str, Any]) -> None:
    assert unflatten(flatten(tree), {}) == tree


@given(st.lists(KEYS, min_size=1, max_size=5))
def test_names_can_be_split_again(keys: list[str]) -> None:
    name = ""
    for key in keys:
        name = child(name, key)
    assert split(name) == keys


@pytest.mark.parametrize("key", ["", "a\nb", "\x00", "\x7f", "\x85", "\u2028", "\ud800"])
def test_keys_that_cannot_be_printed_are_refused(key: str) -> None:
    with pytest.raises(StateError, match=r"under 'a/b'.*rename it"):
        child("a/b", key)


@pytest.mark.parametrize("name", ["", "a//b", "/a", "a/", "a~2", "a~", "/".join("a" * 65)])
def test_hostile_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidManifest, match="name"):
        unflatten({name: 1}, {})


def test_a_name_cannot_be_leaf_and_container() -> None:
    for names in (("a", "a/b"), ("a/b", "a"), ("a/b/c", "a/b"), ("a", "a/b/c")):
        with pytest.raises(InvalidManifest, match="'a"):
            unflatten(dict.fromkeys(names, 1), {})


def test_containers_are_built_again() -> None:
    leaves = {"a/0": 10, "a/1/x": 11, "b/1": 20, "b/true": 21, "b/null/0": 22}
    containers = {"a": Container.of("list", 2), "b": Container("dict", (True, 1, None)), "b/null": Container.of("tuple", 1)}
    tree = unflatten(leaves, containers)
    assert tree == {"a": [10, {"x": 11}], "b": {True: 20, None: (22,)}} or tree["b"].keys() == {1, None}


def test_containers_come_back_in_the_order_of_their_keys() -> None:
    leaves = {f"a/{at}": at for at in sorted(map(str, range(12)))}
    assert unflatten(leaves, {"a": Container.of("tuple", 12)})["a"] == tuple(str(at) for at in range(12))


def test_a_container_of_which_a_part_was_loaded_is_a_dict() -> None:
    assert unflatten({"a/1": 5}, {"a": Container.of("list", 3)}) == {"a": {1: 5}}


def test_a_container_record_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidManifest, match="container 'a' has no key '2'"):
        unflatten({"a/2": 5}, {"a": Container.of("list", 2)})


def index(*names: str) -> StoredIndex:
    layout = MeshLayout((2,), Mesh((0,), (1,)), (Replicate(),))
    return StoredIndex(1, {name: StoredTensor("float32", layout) for name in names})


def test_below_finds_just_the_subtree() -> None:
    stored = index("a", "a.b/c", "a/b", "a/b/c", "a/bc", "a0", "ab")
    assert stored.below("a") == ["a", "a/b", "a/b/c", "a/bc"]
    assert stored.below("a/b") == ["a/b", "a/b/c"]
    assert stored.below("b") == []
    assert stored.below("") == stored.names


def test_children_are_keys() -> None:
    assert index("a/x~1y/1", "a/x~1y/2", "a/~0", "b").children("a") == ["x/y", "~"]
