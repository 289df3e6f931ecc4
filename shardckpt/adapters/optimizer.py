# SPDX-License-Identifier: Apache-2.0
"""Optimizers: state by parameter name, hyperparameters by group.

Below the optimizer's own name stand

- ``state/<parameter>/<key>``: its state; tensors are laid out as they are (DTensor state is sharded as its parameter);
- ``param_groups/<group>/<key>``: hyperparameters, where ``<group>`` is the group's index and a hash of its values, so that
  pipeline stages, whose groups of the same index may differ, do not use one name for two things;
- ``group_of/<parameter>``: the group of each parameter, frozen ones included;
- ``class``: name of the optimizer's class.

`torch.distributed.checkpoint.state_dict.get_optimizer_state_dict` names state by parameter too. What is different here:
saving takes no optimizer step to make state that is not there, and drops no gradients; several optimizers and modules
can stand in one state; loading writes to the optimizer's state itself, because ``Optimizer.load_state_dict`` casts state
to the parameter's dtype; state that was not saved is removed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch.optim import Optimizer

from ..describe import Placed
from ..errors import StateError, TargetMismatch
from ..values import encode_value
from .adapter import Adapter
from .allocate import StateAllocator
from .base import Finish, below, is_plain
from .dtypes import dtype_named
from .fsdp1 import cut
from .groups import open_groups
from .opening import Opening
from .saving import Saving
from .wrappers import Slot

NOT_STORED = ("params", "param_names")
"""Keys of a param group that are no hyperparameters."""


@dataclass(frozen=True, slots=True)
class Parts:
    """An optimizer as the functions here need it."""

    optimizer: Optimizer
    """The one that holds the state and takes the step."""
    groups: list[dict[str, Any]]
    """All param groups, with all parameters."""
    owns: Callable[[torch.Tensor], bool]
    """Whether this rank keeps the state of a parameter."""
    settle: Callable[[], None]
    """Called after loading."""

    @property
    def state(self) -> MutableMapping[Any, Any]:
        """State by parameter."""
        return self.optimizer.state


class OptimizerAdapter(Adapter):
    """All optimizers that keep their state in ``state`` and ``param_groups``."""

    def takes(self, value: object) -> bool:
        return isinstance(value, Optimizer)

    def parts(self, value: Any, path: str) -> Parts:
        """What is saved and loaded of ``value``."""
        return Parts(value, value.param_groups, lambda _: True, lambda: None)

    def expand(self, value: Any, path: str, saving: Saving) -> Any:
        parts = self.parts(value, path)
        slots = saving.names.slots(parts.groups, path)
        _check_state(parts, slots, path)
        tree: dict[str, Any] = {"class": type(parts.optimizer).__name__}
        groups, group_of = {}, {}
        for at, group in enumerate(parts.groups):
            hyperparameters = {key: item for key, item in group.items() if key not in NOT_STORED}
            name = group_name(at, hyperparameters, path)
            groups[name] = hyperparameters
            group_of.update({slot.fqn: name for param in group["params"] for slot in slots[param]})
        state = {}
        for param, param_slots in slots.items():
            entries = parts.state.get(param)
            if entries and parts.owns(param):
                for slot in param_slots:
                    state[slot.fqn] = _cut_all(entries, slot, param, below(path, "state", slot.fqn), saving.here.rank)
        others = {key: item for key, item in parts.state.items() if not isinstance(key, torch.Tensor)}
        sections = {"param_groups": groups, "group_of": group_of, "state": state, "others": others}
        tree.update({key: section for key, section in sections.items() if section})
        return tree

    def open(self, value: Any, path: str, opening: Opening, *, per_rank: bool) -> Finish:
        parts = self.parts(value, path)
        slots = opening.names.slots(parts.groups, path)
        _check_state(parts, slots, path)
        finishes = [open_groups(parts.groups, type(parts.optimizer).__name__, slots, path, opening, per_rank)]
        for group in parts.groups:
            for param in group["params"]:
                if parts.owns(param):
                    loader = _ParameterState(parts, group, param, path, opening, per_rank)
                    finishes.append(loader.open(slots[param]))
                else:
                    for slot in slots[param]:
                        opening.used.update(opening.stored.below(below(path, "state", slot.fqn)))
        others = opening.adopt(below(path, "others"), parts.state, opening.allocate_host, per_rank=per_rank)
        if others is not None:
            finishes.append(lambda: parts.state.update(others()))

        def put_back() -> Any:
            for finish in finishes:
                finish()
            parts.settle()
            return value

        return put_back


def group_name(at: int, hyperparameters: Mapping[str, Any], path: str) -> str:
    """Name of the group number ``at``: equal for groups of the same number and values."""
    plain = {key: encode_value(item, path) for key, item in hyperparameters.items() if is_plain(item)}
    return f"{at}-{xxhash.xxh3_64_hexdigest(json.dumps(plain, sort_keys=True).encode())[:8]}"


def _check_state(parts: Parts, slots: Mapping[torch.Tensor, list[Slot]], path: str) -> None:
    for key in parts.state:
        if isinstance(key, torch.Tensor) and key not in slots:
            raise StateError(
                f"{path!r}: the optimizer has state for a parameter of shape {tuple(key.shape)} that is in none of its "
                "param groups; delete that state, or add the parameter to a group",
                path=path,
            )


def _cut_all(entries: Any, slot: Slot, param: torch.Tensor, path: str, rank: int) -> Any:
    """State entries of a parameter as they are stored for one of its slots."""
    if slot.layout is None or is_plain(entries):
        return entries
    if isinstance(entries, torch.Tensor):
        return cut_flat(entries, slot, param, path, rank)
    if isinstance(entries, Mapping):
        return {key: _cut_all(item, slot, param, below(path, str(key)), rank) for key, item in entries.items()}
    if type(entries) is list or type(entries) is tuple:
        cut = [_cut_all(item, slot, param, below(path, str(at)), rank) for at, item in enumerate(entries)]
        return cut if type(entries) is list else tuple(cut)
    return entries


def cut_flat(entry: torch.Tensor, slot: Slot, param: torch.Tensor, path: str, rank: int) -> Any:
    """The part of a flat state tensor that belongs to one parameter of a flat one."""
    if entry.dim() == 0:
        return entry
    if entry.shape != param.shape or entry.dim() != 1:
        raise StateError(
            f"{path!r}: optimizer state of shape {tuple(entry.shape)} for a flat parameter of shape "
            f"{tuple(param.shape)} does not belong to elements of it; use fully_shard (FSDP2) with this optimizer",
            path=path,
        )
    return cut(entry, slot, rank)


class _ParameterState:
    """Loads the state of one parameter, or of all that lie in a flat one."""

    def __init__(
        self,
        parts: Parts,
        group: dict[str, Any],
        param: torch.Tensor,
        path: str,
        opening: Opening,
        per_rank: bool,
    ) -> None:
        self.parts, self.group, self.param = parts, group, param
        self.path, self.opening, self.per_rank = path, opening, per_rank

    def open(self, slots: list[Slot]) -> Finish:
        """Ask for the state of all slots."""
        if slots[0].layout is not None:
            return self._open_flat(slots)
        path = below(self.path, "state", slots[0].fqn)
        allocator = self._allocator(path)
        current = self.parts.state.get(self.param)
        finish = self.opening.adopt(path, current, allocator, per_rank=self.per_rank)
        if finish is not None:
            return lambda: self._set(finish())
        return self._remove if self._is_removed(slots[0]) else lambda: None

    def _allocator(self, path: str) -> StateAllocator:
        return StateAllocator(self.parts.optimizer, self.group, self.param, path, self.opening.here.rank)

    def _is_removed(self, slot: Slot) -> bool:
        """Whether the checkpoint knows the parameter, but has no state for it."""
        known = self.opening.value(below(self.path, "group_of", slot.fqn)) is not None
        path = below(self.path, "state", slot.fqn)
        return known and not self.opening.stored.below(path) and self.opening.select(path)

    def _set(self, state: dict[str, Any]) -> None:
        self.parts.state[self.param] = state

    def _remove(self) -> None:
        self.parts.state.pop(self.param, None)

    def _open_flat(self, slots: list[Slot]) -> Finish:
        """One set of flat tensors takes the state of all slots."""
        entries: dict[str, Any] = dict(self.parts.state.get(self.param) or {})
        finishes: dict[str, Finish] = {}
        removed: list[Slot] = []
        single: set[str] = set()
        for slot in slots:
            path = below(self.path, "state", slot.fqn)
            if not self.param.numel():  # this rank holds nothing of the parameter, so no state either
                self.opening.used.update(self.opening.stored.below(path))
                continue
            for key in self.opening.stored.children(path):
                if key not in entries:
                    entries[key] = self._allocate_flat(path, key, slot, slots)
            template = {key: self._part(entry, slot, path) for key, entry in entries.items()}
            # one number for all parameters: each further one is read beside it, to see that it is the same
            template |= {key: torch.empty_like(entries[key], device="cpu") for key in single}
            finish = self.opening.adopt(path, template, self._refuse_flat, per_rank=self.per_rank)
            if finish is not None:
                finishes[slot.fqn] = finish
                single.update(key for key, entry in entries.items() if isinstance(entry, torch.Tensor) and entry.dim() == 0)
            elif self._is_removed(slot):
                removed.append(slot)
        if not finishes:
            return self._remove if removed else lambda: None

        def put_back() -> None:
            entries.update(self._agreed({fqn: finish() for fqn, finish in finishes.items()}))
            for slot in removed:
                for entry in entries.values():
                    part = self._part(entry, slot, self.path)
                    if isinstance(part, Placed):
                        part.data.zero_()
            self._set(entries)

        return put_back

    def _part(self, entry: Any, slot: Slot, path: str) -> Any:
        return cut_flat(entry, slot, self.param, path, self.opening.here.rank) if isinstance(entry, torch.Tensor) else entry

    def _agreed(self, stored: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """What is stored for each of the parameters and is one for all of them, by key."""
        agreed: dict[str, tuple[str, Any]] = {}
        for fqn, entries in stored.items():
            for key, value in entries.items():
                if isinstance(value, Placed):
                    continue
                first, known = agreed.setdefault(key, (fqn, value))
                if value is not known and value != known:
                    raise TargetMismatch(
                        f"{self.path!r}: {key!r} is {_number(known)} for {first!r} and {_number(value)} for {fqn!r} in the "
                        "checkpoint, but in the target these lie in one flat parameter that has one of it. Use an optimizer "
                        "that keeps state by parameter, such as that of fully_shard (FSDP2)",
                        name=self.path,
                    )
        return {key: value for key, (_, value) in agreed.items()}

    def _allocate_flat(self, path: str, key: str, slot: Slot, slots: list[Slot]) -> Any:
        """Flat state for all parameters of the flat one; for single numbers as for any parameter."""
        name = below(path, key)
        found = self.opening.stored.tensor(name)
        if found is None:
            return None
        if self._is_elementwise(key, slots):
            return torch.zeros(self.param.shape, dtype=dtype_named(found[1].dtype), device=self.param.device)
        return self._allocator(path)(name, found[1])

    def _is_elementwise(self, key: str, slots: list[Slot]) -> bool:
        """Whether state of this key has the shapes of the parameters, which are single numbers themselves in rare cases."""
        for slot in slots:
            found = self.opening.stored.tensor(below(self.path, "state", slot.fqn, key))
            if found is not None and slot.layout is not None and slot.layout.shape:
                return found[1].shape(0) == slot.layout.shape
        return key != "step"

    def _refuse_flat(self, name: str, stored: Any) -> Any:
        raise StateError(
            f"{name!r}: stored optimizer state of shape {stored.shape(0)} does not fit a flat parameter; use "
            "fully_shard (FSDP2) with this optimizer",
            path=name,
        )


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
