# SPDX-License-Identifier: Apache-2.0
"""The rule of what is a leaf, a value or a container, for saving and loading alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import DuplicateName, StateError
from ..manifest import DEPTH_LIMIT
from ..tree import child, escape
from ..values import Container, is_scalar, key_text

Finish = Callable[[], Any]
"""Puts back what was loaded, once all tensors are filled, and returns what then stands in the state."""


@dataclass(frozen=True, slots=True, eq=False)
class PerRank:
    """Marks a part of the state that each rank has for itself: its tensors and values are stored once per rank.

    On another world size, ranks that the checkpoint has get their own; further ranks keep what they have.
    """

    value: Any
    """A tensor, a value, an object with state_dict and load_state_dict, or a mapping of these."""


class Nothing:
    """What an adapter makes of an object that has no state."""


def is_plain(value: object, depth: int = 0) -> bool:
    """Whether ``value`` is a value all through, so that it is stored as one."""
    if depth > DEPTH_LIMIT:
        return False
    if is_scalar(value):
        return True
    if type(value) is list or type(value) is tuple:
        return all(is_plain(item, depth + 1) for item in value)
    if isinstance(value, Mapping):
        return all(is_plain(key, depth + 1) and is_plain(item, depth + 1) for key, item in value.items())
    return False


def is_node(value: object) -> bool:
    """Whether ``value`` is a plain dict with names for keys, which is a node of the tree and nothing else."""
    return type(value) is dict and bool(value) and _has_names(value)


def is_value_leaf(value: object) -> bool:
    """Whether ``value`` is stored as one value: mappings with str keys are nodes of the tree, unless empty."""
    if isinstance(value, Mapping) and not isinstance(value, Counter) and value:
        return not _has_names(value) and is_plain(value)
    return is_plain(value)


def _has_names(value: Mapping[Any, Any]) -> bool:
    """Whether all keys are str, and no subclass."""
    return set(map(type, value)) <= {str}


def container_of(value: Any, path: str) -> tuple[dict[str, Any], Container | None] | None:
    """Children by key, and the record that names alone do not tell; None when ``value`` is no container."""
    if type(value) is list or type(value) is tuple:
        container = Container.of("list" if type(value) is list else "tuple", len(value))
        return {str(at): item for at, item in enumerate(value)}, container
    if not isinstance(value, Mapping):
        return None
    if _has_names(value):
        return dict(value), None
    keys: dict[str, Any] = {}
    for key in value:
        text = key_text(key)
        if text in keys:
            name = child(path, text)
            raise DuplicateName(f"{name!r}: two keys of one mapping have this name: {keys[text]!r} and {key!r}", name=name)
        keys[text] = key
    return {text: value[key] for text, key in keys.items()}, Container("dict", tuple(value))


class Descent:
    """The containers and objects that a walk is inside of: refuses cycles and trees that are too deep."""

    def __init__(self) -> None:
        self._inside: set[int] = set()

    def enter(self, value: object, path: str) -> None:
        """Go into ``value``."""
        if id(value) in self._inside:
            raise StateError(f"{path!r}: the {type(value).__name__} there holds itself; break the cycle", path=path)
        if len(self._inside) >= DEPTH_LIMIT:
            raise StateError(f"{path!r}: the state is nested deeper than {DEPTH_LIMIT} levels", path=path)
        self._inside.add(id(value))

    def leave(self, value: object) -> None:
        """Come out of ``value``."""
        self._inside.discard(id(value))


def below(path: str, *keys: str) -> str:
    """The name of what stands under ``keys`` below ``path``, for keys known to be fit for names."""
    return "/".join([path, *map(escape, keys)])
