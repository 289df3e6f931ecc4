# SPDX-License-Identifier: Apache-2.0
"""The walk over a target that is loaded into: what it wants of a checkpoint, and how it is put back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import torch

from ..describe import Flat, LocalTensor, Placed, Whereabouts, check_fillable, describe, is_tensor_leaf
from ..errors import TargetMismatch
from ..tree import StoredIndex, StoredTensor, child
from ..values import Container, key_text, unsupported
from .base import Descent, Finish, PerRank, container_of, is_plain, is_value_leaf
from .dtypes import dtype_name, dtype_named
from .names import ParameterNames

Allocate = Callable[[str, StoredTensor], Any]
"""Makes the tensor that a stored one is read into, by its stored name."""


class Opens(Protocol):
    """What loading needs of an adapter."""

    def takes(self, value: object) -> bool: ...

    def open(self, value: Any, path: str, opening: Opening, *, per_rank: bool) -> Finish: ...


class Opening:
    """Walks a target and collects what it wants."""

    def __init__(
        self,
        adapters: Sequence[Opens],
        names: ParameterNames,
        here: Whereabouts,
        stored: StoredIndex,
        select: Callable[[str], bool],
    ) -> None:
        self.names = names
        self.here = here
        self.stored = stored
        self.select = select
        self.wanted: list[LocalTensor] = []
        """Memory to fill in place."""
        self.values_wanted: list[str] = []
        """Names of values that are put back."""
        self.kept: list[str] = []
        """Per-rank names for which this rank, being beyond the saved world size, keeps what it has."""
        self.used: set[str] = set()
        """Stored names that something wants."""
        self._adapters = adapters
        self._descent = Descent()
        self._absent: list[tuple[str, int]] = []
        self._asked: dict[int, tuple[Any, str]] = {}
        """By object id: the tensor leaf, and the name it was asked for with."""

    @property
    def missing(self) -> list[str]:
        """Names that the target wants and the checkpoint does not have; tied names need one of them."""
        return sorted(name for name, leaf_id in self._absent if leaf_id not in self._asked)

    @property
    def beyond(self) -> bool:
        """Whether the checkpoint has no rank of this number."""
        return self.here.rank >= self.stored.world_size

    def is_unexpected(self, name: str) -> bool:
        """Whether a stored name is to be loaded, is there for this rank, and nothing has wanted it."""
        if name in self.used or not self.select(name):
            return False
        found = self.stored.tensors.get(name)
        if found is None or not found.per_rank:
            return True
        return not self.beyond and found.shape(self.here.rank) is not None

    def miss(self, name: str, leaf: object = None) -> None:
        """Note that ``name`` is wanted but not stored."""
        if self.select(name):
            self._absent.append((name, id(leaf) if leaf is not None else -1))

    def value(self, name: str, default: Any = None) -> Any:
        """The stored value of that name, whether it was saved per rank or not."""
        own = self.stored.per_rank_values
        return own[name] if name in own else self.stored.values.get(name, default)

    def keep(self, path: str) -> None:
        """Note that a per-rank subtree stays as it is."""
        names = self.stored.below(path)
        self.used.update(names)
        self.kept += names or [path]

    # ---- driven by the target

    def open_root(self, state: Mapping[str, Any]) -> Finish:
        """Ask for what a whole state wants."""
        return self._open_container("", state, per_rank=False)

    def open(self, path: str, target: Any, *, per_rank: bool = False) -> Finish:
        """Ask for what ``target`` wants from the subtree ``path``."""
        if isinstance(target, PerRank):
            return self._open_per_rank(path, target)
        if is_tensor_leaf(target):
            self.tensor(path, target, per_rank=per_rank)
            return lambda: target
        adapter = next((adapter for adapter in self._adapters if adapter.takes(target)), None)
        if adapter is None and is_value_leaf(target):
            return self._open_value(path, target, per_rank)
        self._descent.enter(target, path)
        if adapter is not None:
            finish = adapter.open(target, path, self, per_rank=per_rank)
        else:
            finish = self._open_container(path, target, per_rank)
        self._descent.leave(target)
        return finish

    def _open_per_rank(self, path: str, target: PerRank) -> Finish:
        if self.beyond:
            self.keep(path)
            return lambda: target
        finish = self.open(path, target.value, per_rank=True)

        def put_back() -> PerRank:
            value = finish()
            return target if value is target.value else PerRank(value)

        return put_back

    def _open_container(self, path: str, target: Any, per_rank: bool) -> Finish:
        found = container_of(target, path)
        if found is None:
            raise unsupported(target, path)
        children, container = found
        if container is not None and path in self.stored.per_rank_values:
            self.used.add(path)
        finishes = {key: self.open(child(path, key), item, per_rank=per_rank) for key, item in children.items()}
        keys = dict(zip(children, container.keys if container else children, strict=True))

        def put_back() -> Any:
            new = {keys[key]: finish() for key, finish in finishes.items()}
            if all(value is old for value, old in zip(new.values(), children.values(), strict=True)):
                return target
            if isinstance(target, MutableMapping | list):
                for key, value in new.items():
                    target[key] = value
                return target
            return tuple(new.values()) if isinstance(target, tuple) else new

        return put_back

    def _open_value(self, path: str, target: Any, per_rank: bool) -> Finish:
        if not self.select(path):
            return lambda: target
        values = self._values(path, per_rank)
        if path in values:
            self.used.add(path)
            self.values_wanted.append(path)
            return lambda: values[path]
        if self.stored.tensor(path) is not None:
            raise TargetMismatch(
                f"{path!r}: the checkpoint has a tensor there, but the target a {type(target).__name__}. "
                "Put a tensor of the same shape into the target, or leave the key out.",
                name=path,
            )
        # an empty mapping at the top leaves nothing in a checkpoint
        is_node = isinstance(target, Mapping) and (self.stored.below(path) or (not target and "/" not in path))
        if not is_node:
            self.miss(path)
        return lambda: target

    def _values(self, path: str, per_rank: bool) -> Mapping[str, Any]:
        if per_rank and path in self.stored.per_rank_values:
            return self.stored.per_rank_values
        if not per_rank and path in self.stored.per_rank_values:
            raise self._not_per_rank(path)
        return self.stored.values

    def _not_per_rank(self, path: str) -> TargetMismatch:
        return TargetMismatch(
            f"{path!r}: each rank saved its own; wrap it in shardckpt.PerRank(...) in the target too", name=path
        )

    def tensor(self, path: str, leaf: Any, *, per_rank: bool = False, source_rank: int | None = None) -> bool:
        """Ask for the stored tensor ``path``, to be read into the memory of ``leaf``; whether it is stored."""
        if not self.select(path):
            return False
        found = self.stored.tensor(path)
        if found is None:
            if path in self.stored.values or path in self.stored.per_rank_values:
                raise TargetMismatch(
                    f"{path!r}: the checkpoint has a value there, but the target a tensor. "
                    "Put a value into the target, or leave the key out.",
                    name=path,
                )
            self.miss(path, leaf)
            return False
        name, stored = found
        if stored.per_rank and not per_rank:
            raise self._not_per_rank(path)
        self.used.update((path, name))
        if id(leaf) in self._asked and not per_rank:
            return True
        rank = self.here.rank if source_rank is None else source_rank
        if stored.per_rank and stored.shape(rank) is None:
            self.miss(path, leaf)
            return False
        self._asked[id(leaf)] = (leaf, path)
        placed = describe(leaf, path, self.here.rank, per_rank=stored.per_rank)
        if placed is not None:
            check_fillable(placed.data, path)
            self.wanted.append(LocalTensor(name, placed.data, placed.layout, source_rank=rank if stored.per_rank else None))
        return True

    # ---- driven by the checkpoint

    def adopt(self, path: str, template: Any, allocate: Allocate, *, per_rank: bool = False) -> Finish | None:
        """Ask for all that is stored in the subtree ``path``; None when nothing of it is stored and selected.

        Tensors go into those of ``template`` (what stands there now) where they fit, else where ``allocate`` says.
        What is not selected stays as it is in ``template``.
        """
        if not any(map(self.select, self.stored.below(path))):
            return None
        return self._adopt(path, template, allocate, per_rank)

    def _adopt(self, path: str, template: Any, allocate: Allocate, per_rank: bool) -> Finish | None:
        values = self._values(path, per_rank)
        if path in values and not isinstance(values[path], Container):
            if not self.select(path):
                return None if template is None else lambda: template
            self.used.add(path)
            self.values_wanted.append(path)
            return lambda: values[path]
        found = self.stored.tensor(path)
        if found is not None:
            if not self.select(path):
                return None if template is None else lambda: template
            leaf = template if _fits(template, found[1], self.here.rank) else allocate(path, found[1])
            self.tensor(path, leaf, per_rank=per_rank)
            return lambda: leaf
        container = self.stored.containers.get(path)
        if path in values:
            container = values[path]
            self.used.add(path)
        finishes: dict[str, Finish] = {}
        for key in self.stored.children(path):
            finish = self._adopt(child(path, key), _child_of(template, key), allocate, per_rank)
            if finish is not None:
                finishes[key] = finish

        def put_back() -> Any:
            children = {key: finish() for key, finish in finishes.items()}
            return children if container is None else container.build(children)

        return put_back

    def allocate_host(self, name: str, stored: StoredTensor) -> torch.Tensor:
        """A plain, whole tensor in host memory for a stored one."""
        shape = stored.shape(self.here.rank)
        return torch.empty(() if shape is None else shape, dtype=dtype_named(stored.dtype))


def _child_of(template: Any, key: str) -> Any:
    if isinstance(template, Mapping):
        if key in template:
            return template[key]
        return next((item for name, item in template.items() if is_plain(name) and key_text(name) == key), None)
    if isinstance(template, list | tuple) and key.isdecimal() and int(key) < len(template):
        return template[int(key)]
    return None


def _fits(template: Any, stored: StoredTensor, rank: int) -> bool:
    """Whether to read into what is there. What is sharded is never replaced by a plain tensor of another shape."""
    if not is_tensor_leaf(template):
        return False
    if isinstance(template, Placed | Flat) or type(template).__name__ in ("DTensor", "ShardedTensor"):
        return True
    same = tuple(template.shape) == stored.shape(rank) and dtype_name(template.dtype) == stored.dtype
    return same and template.device.type != "meta"
