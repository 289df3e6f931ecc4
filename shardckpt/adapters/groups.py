# SPDX-License-Identifier: Apache-2.0
"""Hyperparameters of param groups: from a checkpoint into the groups of an optimizer, matched by parameter names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import TargetMismatch
from .base import Finish, below
from .opening import Opening
from .wrappers import Slot

_LATER_KEYS = {"initial_lr", "params", "param_names"}
"""Keys that do not tell kinds of optimizers apart."""


def open_groups(
    groups: list[dict[str, Any]],
    kind: str,
    slots: Mapping[torch.Tensor, list[Slot]],
    path: str,
    opening: Opening,
    per_rank: bool,
) -> Finish:
    """Ask for the hyperparameters of all groups.

    Each group takes those of the stored group that its parameters were in. It may be a part of that one, or several
    stored groups with the same hyperparameters (pipeline stages). Parameters that no stored group has are missing.
    Raises TargetMismatch when the groups, or the kind of the optimizer, do not fit.
    """
    fed_by: dict[str, int] = {}
    finishes: list[Finish] = []
    for at, group in enumerate(groups):
        sources = _sources(group, slots, path, opening)
        for source in sources:
            if fed_by.setdefault(source, at) != at:
                raise _regrouped(path, f"groups {fed_by[source]} and {at} were one group", opening, groups, slots)
        differing = _first_difference(sources, path, opening)
        if differing is not None:
            problem = f"group {at} was several groups, which differ in {differing!r}"
            raise _regrouped(path, problem, opening, groups, slots)
        for source in sources:
            opening.used.update(opening.stored.below(below(path, "param_groups", source)))
        if sources:
            _check_kind(kind, group, sources[0], path, opening)
            finishes.append(_open_group(group, below(path, "param_groups", sources[0]), opening, per_rank))
    opening.used.add(below(path, "class"))

    def put_back() -> None:
        for finish in finishes:
            finish()

    return put_back


def _sources(group: dict[str, Any], slots: Mapping[torch.Tensor, list[Slot]], path: str, opening: Opening) -> list[str]:
    """Stored groups that the parameters of ``group`` were in, but for those that are not to be loaded."""
    sources: dict[str, None] = {}
    for param in group["params"]:
        for slot in slots[param]:
            name = below(path, "group_of", slot.fqn)
            source = opening.value(name)
            if source is None:
                # a frozen one has no state and takes no step, so that trainers may drop it from its group
                if param.requires_grad:
                    opening.miss(name)
            else:
                opening.used.add(name)
                sources[source] = None
    groups = below(path, "param_groups")
    return [source for source in sources if any(map(opening.select, opening.stored.below(below(groups, source))))]


def _open_group(group: dict[str, Any], path: str, opening: Opening, per_rank: bool) -> Finish:
    finish = opening.adopt(path, group, opening.allocate_host, per_rank=per_rank)
    if finish is None:
        return lambda: None

    def put_back() -> None:
        for key, value in finish().items():
            current = group.get(key)
            if isinstance(current, torch.Tensor) and not isinstance(value, torch.Tensor):
                current.fill_(value)  # graphs and compiled steps hold on to the tensor
            else:
                group[key] = value

    return put_back


def _first_difference(sources: list[str], path: str, opening: Opening) -> str | None:
    """A hyperparameter in which stored groups differ."""

    def hyperparameters(source: str) -> dict[str, Any]:
        at = below(path, "param_groups", source)
        return {name.removeprefix(at): opening.value(name) for name in opening.stored.below(at)}

    first = hyperparameters(sources[0]) if sources else {}
    for source in sources[1:]:
        other = hyperparameters(source)
        for key in sorted(first.keys() | other.keys()):
            if first.get(key, opening) != other.get(key, opening):
                return key.removeprefix("/")
    return None


def _check_kind(kind: str, group: dict[str, Any], source: str, path: str, opening: Opening) -> None:
    stored_kind = opening.value(below(path, "class"), kind)
    stored = set(opening.stored.children(below(path, "param_groups", source))) - _LATER_KEYS
    current = group.keys() - _LATER_KEYS
    if stored_kind != kind and stored - current and current - stored:
        raise TargetMismatch(
            f"{path!r}: the checkpoint has the state of {stored_kind}, the target is {kind}. Their hyperparameters differ "
            f"(stored only: {sorted(stored - current)}; target only: {sorted(current - stored)}). Use the same kind of "
            f"optimizer, or choose with keys= what to load without {path}/*.",
            name=path,
        )


def _regrouped(
    path: str,
    problem: str,
    opening: Opening,
    groups: list[dict[str, Any]],
    slots: Mapping[torch.Tensor, list[Slot]],
) -> TargetMismatch:
    stored: dict[str, list[str]] = {}
    prefix = below(path, "group_of") + "/"
    for name in opening.stored.below(below(path, "group_of")):
        stored.setdefault(opening.value(name), []).append(name.removeprefix(prefix))
    target = {str(at): [s.fqn for p in g["params"] for s in slots[p]] for at, g in enumerate(groups)}
    return TargetMismatch(
        f"{path!r}: the optimizer's param groups do not fit the stored ones: {problem}. Stored: {_sketch(stored)}; "
        f"target: {_sketch(target)}. Group the parameters as they were, or choose with keys= what to load without "
        f"{path}/param_groups/*, so that hyperparameters stay as they are in the target.",
        name=path,
    )


def _sketch(groups: Mapping[str, list[str]]) -> str:
    return ", ".join(
        f"{name}: {', '.join(members[:3])}{f' and {len(members) - 3} more' if len(members) > 3 else ''}"
        for name, members in groups.items()
    )
