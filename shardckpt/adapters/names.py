# SPDX-License-Identifier: Apache-2.0
"""Which name each parameter of an optimizer goes by: the one that a module of the same state gives it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..errors import DuplicateName, StateError
from .base import PerRank
from .fsdp1 import parameter_slots
from .loaded import is_fsdp1
from .owners import SlotOwner
from .wrappers import NameCleaner, Slot, reshard, strip_wrappers, unwrap


def find(value: Any, path: str, seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module | torch.Tensor | SlotOwner]]:
    """All modules, tensors and owners of slots in the containers of a state, with readable paths."""
    seen = set() if seen is None else seen
    if isinstance(value, PerRank):
        value = value.value
    if isinstance(value, nn.Module | torch.Tensor | SlotOwner):
        yield path, value
    elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
        seen.add(id(value))
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from find(item, f"{path}.{key}" if path else str(key), seen)


class ParameterNames:
    """Names of all parameters of the modules and tensors in a state."""

    def __init__(self, state: Any) -> None:
        self._slots: dict[int, tuple[str, list[Slot]]] = {}
        """By id of the parameter: path of the owner, and the slots."""
        self._alive: list[Any] = []
        for path, owner in find(state, ""):
            self._alive.append(owner)
            if isinstance(owner, nn.Module):
                for param, slots in _module_slots(owner):
                    self._offer(param, path, slots)
            elif isinstance(owner, SlotOwner):
                for param, slots in owner.parameter_slots():
                    self._offer(param, path, slots)
        for path, owner in find(state, ""):
            if isinstance(owner, torch.Tensor) and id(owner) not in self._slots:
                self._offer(owner, "", [Slot(path)])

    def _offer(self, param: torch.Tensor, path: str, slots: list[Slot]) -> None:
        """Take the name from the outermost module: it stays when a submodule is added to the state."""
        known = self._slots.get(id(param))
        if known is None or (path != known[0] and slots[0].fqn.count(".") > known[1][0].fqn.count(".")):
            self._slots[id(param)] = (path, slots)

    def slots(self, groups: list[dict[str, Any]], path: str) -> dict[torch.Tensor, list[Slot]]:
        """The slots of each parameter in the groups of the optimizer at ``path``.

        Raises StateError when a parameter has no name, DuplicateName when two have the same.
        """
        found = {param: self._find(group, at, path) for group in groups for at, param in enumerate(group["params"])}
        counts = Counter(slot.fqn for _, slots in found.values() for slot in slots)
        named: dict[torch.Tensor, list[Slot]] = {}
        for param, (owner, slots) in found.items():
            # one optimizer for several modules of a state: where their names collide, the module tells them apart
            named[param] = [replace(s, fqn=f"{owner}.{s.fqn}") if counts[s.fqn] > 1 and owner else s for s in slots]
        twice = Counter(slot.fqn for slots in named.values() for slot in slots).most_common(1)
        if twice and twice[0][1] > 1:
            raise DuplicateName(f"{path!r}: two parameters of the optimizer have the name {twice[0][0]!r}", path=path)
        return named

    def _find(self, group: dict[str, Any], at: int, path: str) -> tuple[str, list[Slot]]:
        param = group["params"][at]
        known = self._slots.get(id(param))
        if known is not None:
            return known
        given = group.get("param_names")
        if given is not None:
            return "", [Slot(strip_wrappers(given[at]))]
        raise StateError(
            f"{path!r}: parameter {at} of a group of the optimizer (shape {tuple(param.shape)}) has no name. Put the "
            "module that owns it into the state next to the optimizer, as in {'model': model, 'optimizer': optimizer}; "
            "if it is there, make the optimizer after fully_shard, parallelize_module or to_empty, which replace "
            "parameters; or make the optimizer from model.named_parameters().",
            path=path,
        )


def _module_slots(module: nn.Module) -> Iterator[tuple[torch.Tensor, list[Slot]]]:
    root = unwrap(module)
    reshard(root)
    if any(map(is_fsdp1, root.modules())):
        yield from parameter_slots(root)
        return
    cleaner = NameCleaner(root)
    seen: set[int] = set()
    for name, param in root.named_parameters(remove_duplicate=False):
        if id(param) not in seen:
            seen.add(id(param))
            yield param, [Slot(cleaner.clean(name))]
