# SPDX-License-Identifier: Apache-2.0
"""The walk over a state that is saved: from the tree of objects to named tensors and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..describe import LocalTensor, Placed, Whereabouts, describe, is_tensor_leaf
from ..errors import DuplicateName
from ..tree import child
from ..values import Container, Value, encode_value, unsupported
from .base import Descent, Nothing, PerRank, container_of, is_node, is_value_leaf
from .names import ParameterNames


@dataclass
class Captured:
    """The state of this rank as named leaves. Tensors are aliases of the live memory; nothing is copied."""

    tensors: list[LocalTensor] = field(default_factory=list)
    """Tensors that this rank has, in the order of the state."""
    values: dict[str, Value] = field(default_factory=dict)
    """Values by name, equal on all ranks that have the name."""
    per_rank_values: dict[str, Value] = field(default_factory=dict)
    """Values by name that are this rank's own; `Container` records of per-rank containers among them."""
    containers: dict[str, Container] = field(default_factory=dict)
    """Records of containers that names alone do not tell."""


class Expands(Protocol):
    """What saving needs of an adapter."""

    def takes(self, value: object) -> bool: ...

    def expand(self, value: Any, path: str, saving: Saving) -> Any: ...


class Saving:
    """Walks a state and collects its leaves."""

    def __init__(self, adapters: Sequence[Expands], names: ParameterNames, here: Whereabouts) -> None:
        self.names = names
        self.here = here
        self.captured = Captured()
        self._adapters = adapters
        self._descent = Descent()
        self._names: set[str] = set()
        self._first_names: dict[int, tuple[Any, str | None]] = {}
        """By object id: the leaf, kept alive so that the id stays its own, and the first name it was stored under."""

    def add(self, path: str, value: Any, *, per_rank: bool = False) -> None:
        """Collect the leaves of ``value``."""
        if isinstance(value, PerRank):
            self.add(path, value.value, per_rank=True)
        elif is_tensor_leaf(value):
            self._add_tensor(path, value, per_rank)
        elif is_node(value):
            # without asking the adapters: optimizers have one per parameter
            self._descent.enter(value, path)
            for key, item in value.items():
                self.add(child(path, key), item, per_rank=per_rank)
            self._descent.leave(value)
        elif is_value_leaf(value):
            self._add_value(path, value, per_rank)
        else:
            self._descent.enter(value, path)
            adapter = next((adapter for adapter in self._adapters if adapter.takes(value)), None)
            if adapter is not None:
                tree = adapter.expand(value, path, self)
                if tree is not Nothing:
                    self.add(path, tree, per_rank=per_rank)
            else:
                self._add_container(path, value, per_rank)
            self._descent.leave(value)

    def _add_container(self, path: str, value: Any, per_rank: bool) -> None:
        found = container_of(value, path)
        if found is None:
            raise unsupported(value, path)
        children, container = found
        if container is not None:
            encode_value(container, path)
            if per_rank:
                self._add_value(path, container, per_rank)
            else:
                self.captured.containers[path] = container
        for key, item in children.items():
            self.add(child(path, key), item, per_rank=per_rank)

    def _add_value(self, path: str, value: Value, per_rank: bool) -> None:
        encode_value(value, path)
        self._claim(path)
        (self.captured.per_rank_values if per_rank else self.captured.values)[path] = value

    def _add_tensor(self, path: str, leaf: Any, per_rank: bool) -> None:
        self._claim(path)
        if isinstance(leaf, Placed) and not leaf.stored:
            return
        alias_of, first = None, None if per_rank else self._first_names.get(id(leaf))
        if first is None:
            placed = describe(leaf, path, self.here.rank, per_rank=per_rank)
            if not per_rank:
                self._first_names[id(leaf)] = (leaf, None if placed is None else path)
        else:
            alias_of = first[1]
            placed = None if alias_of is None else describe(leaf, path, self.here.rank)
        if placed is not None:
            self.captured.tensors.append(LocalTensor(path, placed.data, placed.layout, alias_of))

    def _claim(self, path: str) -> None:
        if path in self._names:
            raise DuplicateName(f"two leaves of the state have the name {path!r}; rename one of their keys", name=path)
        self._names.add(path)
