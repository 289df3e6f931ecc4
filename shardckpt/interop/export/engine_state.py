# SPDX-License-Identifier: Apache-2.0
"""What a DeepSpeed engine holds, found in a checkpoint of such an engine, or of plain training of a model and an optimizer.

Parameters lie in flat groups, and names do not tell in which order. Checkpoints of `shardckpt.integrations.deepspeed` have the
order as ``deepspeed/parameters``; for others it has to be given: it is the order of the param groups of the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardckpt.errors import ExportRefused
from shardckpt.maintain.parts import Leaf
from shardckpt.maintain.stored import StoredCheckpoint

from .content import Content, ContentReader, Window, is_floating
from .state import read_state

FLOAT = "float32"
"""Of masters and moments."""
_UNSUPPORTED = ("random_ltd", "data_sampler", "grad_scaler")


@dataclass(frozen=True, slots=True)
class Group:
    """A param group."""

    options: Mapping[str, Any]
    """Hyperparameters."""
    weights: Mapping[str, Leaf]
    """Master weights of trainable parameters by name, in the group's order."""
    states: Mapping[str, tuple[Leaf, ...]]
    """By key: state with an element for each of the parameter, in the order of `weights`."""
    scalars: Mapping[str, Any]
    """By key: what is equal for all of its parameters, a value or a `Content`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """An engine's state."""

    groups: tuple[Group, ...]
    """Trainable parameters."""
    frozen: Mapping[str, Content]
    """Parameters that are not trained, and those without elements."""
    others: Mapping[str, Any]
    """Buffers, and values in the model's state."""
    tied: Mapping[str, str]
    """Second names of parameters, and the first ones."""
    counters: Mapping[str, Any]
    """What the engine counts, as `shardckpt.integrations.deepspeed` stores it; ``global_steps`` is always there."""
    lr_scheduler: Any
    """State of the scheduler; None when there is none."""
    client_state: Mapping[str, Any]
    """The caller's own."""
    notes: Sequence[str] = field(default_factory=list)
    """What was taken for granted."""


def read_engine_state(
    stored: StoredCheckpoint, reader: ContentReader, *, order: Sequence[str] | None, model_key: str, optimizer_key: str
) -> EngineState:
    """Read it from a checkpoint; ``order`` are the names of all parameters, those of each param group in the group's order.

    Raises `ExportRefused` when a directory that DeepSpeed resumes from cannot be made of it, and what reading raises.
    """
    tree = read_state(stored, reader)
    for key in (model_key, optimizer_key):
        if not isinstance(tree.get(key), dict):
            raise ExportRefused(f"{stored.url} has no {key!r} at its top: say under which name it is there", key=key)
    counters = {"global_steps": stored.checkpoint.manifest.step, **tree.get("deepspeed", {})}
    notes = [] if "deepspeed" in tree else [f"global_steps is the number of the step, {counters['global_steps']}"]
    for key in _UNSUPPORTED:
        if key in counters:
            raise ExportRefused(f"the state of {key} in {stored.url} has no form here: export what does not use it", key=key)
    if tree[optimizer_key].get("others"):
        raise ExportRefused(f"{optimizer_key!r} has state that belongs to no parameter, which flat groups have no place for")
    order = order or counters.get("parameters")
    if not order:
        raise ExportRefused(
            f"{stored.url} does not tell in which order parameters lie in their groups: give it with --order, a file of names, "
            "[name for name, _ in model.named_parameters()] as a rule"
        )
    return _Sorter(tree[model_key], tree[optimizer_key], list(order), reader, notes).sort(tree, counters)


class _Sorter:
    """Tells trainable parameters, frozen ones and buffers apart."""

    def __init__(
        self,
        model: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        order: Sequence[str],
        reader: ContentReader,
        notes: list[str],
    ) -> None:
        self.model, self.optimizer, self.order, self.reader, self.notes = model, optimizer, order, reader, notes
        strangers = [name for name in order if not isinstance(model.get(name), Content)]
        if strangers or len(set(order)) < len(order):
            what = f"{strangers[0]!r} is not in the checkpoint" if strangers else "a name is there twice"
            raise ExportRefused(f"the order of parameters does not belong to this model: {what}", names=strangers)
        self.first: dict[int, str] = {}
        for name in order:
            self.first.setdefault(id(model[name]), name)
        self.group_of = self._by_first_name(optimizer.get("group_of", {}))
        self.state_of = self._by_first_name(optimizer.get("state", {}))

    def _by_first_name(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """``found`` by the names that stand in the order: a tied parameter has several."""
        named = {name: self.first.get(id(self.model.get(name))) for name in found}
        strangers = [name for name, first in named.items() if first is None]
        if strangers:
            raise ExportRefused(
                f"{strangers[0]!r} is in a param group, and not in the order of parameters: name all of them", names=strangers
            )
        return {first: found[name] for name, first in named.items() if first is not None}

    def sort(self, tree: Mapping[str, Any], counters: Mapping[str, Any]) -> EngineState:
        parameters = list(self.first.values())
        grouped = [name for name in parameters if name in self.group_of and self.model[name].numel]
        trainable = [name for name in grouped if name in self.state_of or not self.state_of]
        if len(trainable) < len(grouped):
            self.notes.append(f"{len(grouped) - len(trainable)} parameters without optimizer state are taken as frozen")
        is_trainable = set(trainable)
        names = {id(content): name for name, content in self.model.items() if isinstance(content, Content)} | self.first
        return EngineState(
            groups=tuple(self._group(number, name, trainable) for number, name in enumerate(self._group_names())),
            frozen={name: self.model[name] for name in parameters if name not in is_trainable},
            others={name: item for name, item in self.model.items() if id(item) not in self.first},
            tied={name: names[id(item)] for name, item in self.model.items() if self.first.get(id(item), name) != name},
            counters=counters,
            lr_scheduler=tree.get("lr_scheduler", tree.get("scheduler")),
            client_state=tree.get("client_state", {}),
            notes=self.notes,
        )

    def _group_names(self) -> list[str]:
        """Names of the param groups, which are their number and a hash."""
        names = sorted(self.optimizer.get("param_groups", {}), key=_number)
        if [_number(name) for name in names] != list(range(len(names))) or not names:
            raise ExportRefused(f"param groups {names} are not those of one optimizer: pipeline stages cannot be exported")
        return names

    def _group(self, number: int, group: str, trainable: Iterable[str]) -> Group:
        names = [name for name in trainable if self.group_of[name] == group]
        weights = {name: _as_float(self.model[name], name) for name in names}
        states: dict[str, tuple[Leaf, ...]] = {}
        scalars: dict[str, Any] = {}
        entries = [self.state_of.get(name, {}) for name in names]
        for key in dict.fromkeys(key for entry in entries for key in entry):
            found = [entry.get(key, _MISSING) for entry in entries]
            where = f"state {key!r} of param group {number}"
            if all(_is_like(item, self.model[name], key) for name, item in zip(names, found, strict=True)):
                leaves = [_as_float(item, where) if is_floating(item.dtype) else _leaf(item) for item in found]
                states[key] = tuple(leaves)
            else:
                scalars[key] = self._equal(found, names, where)
        return Group(self.optimizer["param_groups"][group], weights, states, scalars)

    def _equal(self, found: Sequence[Any], names: Sequence[str], where: str) -> Any:
        """What is one and the same for all parameters of a group."""
        if all(isinstance(item, Content) and item.shape == () for item in found):
            values: list[Any] = self.reader.small([_leaf(item) for item in found])
        elif any(item is _MISSING or isinstance(item, Content | Mapping) for item in found):
            raise ExportRefused(
                f"{where} is not one element for each element of its parameter, which flat groups need", of=where
            )
        else:
            values = list(found)
        for name, value in zip(names, values, strict=True):
            if value != values[0]:
                raise ExportRefused(
                    f"{where} differs between {names[0]!r} and {name!r}: DeepSpeed has one for the whole group", of=where
                )
        return found[0]


_MISSING: Any = object()


def _number(group: str) -> int:
    text = group.partition("-")[0]
    return int(text) if text.isdecimal() else -1


def _is_like(item: Any, weight: Content, key: str) -> bool:
    """Whether state has an element for each one of its parameter. A parameter may be a single number, as ``step`` is."""
    return isinstance(item, Content) and item.shape == weight.shape and (item.shape != () or key != "step")


def _leaf(content: Content) -> Leaf:
    (span,) = content.spans
    if not isinstance(span, Window):
        raise TypeError(f"{span} is no stored tensor")
    return span.leaf


def _as_float(content: Content, what: str) -> Leaf:
    if content.dtype not in ("float32", "bfloat16", "float16"):
        raise ExportRefused(f"{what!r} is {content.dtype}: DeepSpeed's masters and moments are {FLOAT}", name=what)
    return _leaf(content)
