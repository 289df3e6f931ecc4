# SPDX-License-Identifier: Apache-2.0
"""`Weights`: a module that is filled only to be run: under other names, in another dtype or place, or from the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..describe import Placed
from ..errors import ConfigError, DtypeMismatch, DuplicateName, MissingNames, StateError
from ..tree import split
from .adapter import Adapter
from .base import Finish, Nothing, below
from .dtypes import dtype_name, dtype_named
from .loaded import is_dtensor, is_fsdp1, is_fsdp2
from .module import entries, hand_over, is_extra_state
from .opening import Opening
from .saving import Saving
from .wrappers import unwrap


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """A module to fill, and how it is to be afterwards."""

    module: nn.Module
    """May be on the meta device, wholly or in part."""
    dtype: torch.dtype | None = None
    """Of its floating-point parameters and persistent buffers; None leaves each as it is."""
    device: torch.device | None = None
    """Where all of it is to lie; None leaves it where it is, and takes what is on the meta device to the CPU or its mesh."""
    new_name: Callable[[str], str | None] | None = None
    """The name in the module of a stored name; None for one that is not wanted."""


class WeightsAdapter(Adapter):
    """Fills what is of the right kind in place, and puts new memory into the module for the rest once it is filled."""

    def takes(self, value: object) -> bool:
        return isinstance(value, Weights)

    def expand(self, value: Weights, path: str, saving: Saving) -> Any:
        return Nothing

    def open(self, value: Weights, path: str, opening: Opening, *, per_rank: bool) -> Finish:
        places = _Places(value)
        names = _stored_names(value, path, opening)
        handed: dict[str, Finish] = {}
        left: list[tuple[str, Any]] = []
        for name, raw, leaf in entries(value.module, path, opening.here):
            at = names.get(name)
            if is_extra_state(name) or not isinstance(leaf, torch.Tensor | Placed):
                finish = None if at is None else opening.adopt(at, leaf, opening.allocate_host, per_rank=per_rank)
                if finish is None:
                    opening.miss(below(path, name))
                else:
                    handed[raw] = finish
                continue
            place = places.of(leaf, is_stored=at is not None)
            if at is None:
                opening.miss(below(path, name), place)
                left.append((name, leaf))
            else:
                _check_kind(at, place, opening)
                opening.tensor(at, place, per_rank=per_rank)
                places.filled.add(id(leaf))
            if place is not leaf or not places.has(leaf):
                handed[raw] = _constant(place)
        places.require_values(path, left)

        def put_back() -> nn.Module:
            places.move_others()
            if handed:
                state = {raw: finish() for raw, finish in handed.items()}
                hand_over(unwrap(value.module), state, assign=places.are_new)
            return value.module

        return put_back


class _Places:
    """The memory that the tensors of a module are loaded into."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._root = unwrap(weights.module)
        self._tensors = [*self._root.parameters(), *self._root.buffers()]
        self._own = {id(tensor) for tensor in self._tensors}
        meshes = [tensor.device_mesh for tensor in self._tensors if is_dtensor(tensor)]
        self._fallback = torch.device(meshes[0].device_type if meshes else "cpu")
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.filled: set[int] = set()
        """Ids of tensors of the module that are stored."""
        device = weights.device
        if device is not None and meshes and meshes[0].device_type != device.type:
            raise ConfigError(
                f"device={str(device)!r}: the model is cut up over a mesh of {meshes[0].device_type} devices; leave device out"
            )
        if any(is_fsdp1(module) or is_fsdp2(module) for module in self._root.modules()):
            self._require_in_place()

    @property
    def are_new(self) -> bool:
        """Whether any is not the module's own."""
        return bool(self._made)

    def has(self, leaf: Any) -> bool:
        """Whether filling ``leaf`` changes the module; hooks may put copies into a state_dict."""
        return isinstance(leaf, Placed) or id(leaf) in self._own

    def of(self, leaf: Any, *, is_stored: bool) -> Any:
        """Where ``leaf`` is loaded into: itself, or new memory, the same for tied weights."""
        if isinstance(leaf, Placed) or self._fits(leaf):
            return leaf
        if id(leaf) not in self._made:
            data = leaf.detach()
            dtype, device = self._dtype(leaf), self._device(leaf)
            # what is not stored keeps its values
            is_empty = is_stored or data.is_meta
            made = torch.empty_like(data, dtype=dtype, device=device) if is_empty else data.to(device, dtype)
            kept = nn.Parameter(made, requires_grad=leaf.requires_grad) if isinstance(leaf, nn.Parameter) else made
            self._made[id(leaf)] = (leaf, kept)
        return self._made[id(leaf)][1]

    def require_values(self, path: str, left: list[tuple[str, Any]]) -> None:
        """Raise when something on the meta device would have no values; ``left`` are names that are not stored."""
        lost = [n for n, leaf in left if isinstance(leaf, torch.Tensor) and leaf.is_meta and id(leaf) not in self.filled]
        if lost:
            raise MissingNames(
                f"missing in the checkpoint below {path!r}, and without values in the model, being on the meta device: "
                f"{lost[:8]}. Put real tensors in their places first, or say with rename= where they are stored",
                missing=[below(path, name) for name in lost],
                unexpected=[],
            )
        others = [f"{name}.{key}".lstrip(".") for _, name, key, _ in self._others(on_meta=True)]
        if others:
            raise StateError(
                f"{path!r}: {others[:8]} are buffers on the meta device that no checkpoint holds (persistent=False), so there "
                "are no values. Put real tensors in their places first",
                names=others,
            )

    def move_others(self) -> None:
        """Take buffers that are never stored to the device too; they keep their dtype."""
        for module, _, key, buffer in self._others(on_meta=False):
            if self._weights.device is not None:
                module._buffers[key] = buffer.to(self._weights.device)

    def _others(self, *, on_meta: bool) -> Iterator[tuple[nn.Module, str, str, torch.Tensor]]:
        for name, module in self._root.named_modules():
            for key in sorted(module._non_persistent_buffers_set):
                buffer = module._buffers.get(key)
                if buffer is not None and buffer.is_meta is on_meta:
                    yield module, name, key, buffer

    def _fits(self, leaf: torch.Tensor) -> bool:
        return (leaf.dtype, leaf.device) == (self._dtype(leaf), self._device(leaf))

    def _dtype(self, leaf: torch.Tensor) -> torch.dtype:
        wanted = self._weights.dtype
        return wanted if wanted is not None and leaf.is_floating_point() else leaf.dtype

    def _device(self, leaf: torch.Tensor) -> torch.device:
        wanted = self._weights.device
        if wanted is None:
            return self._fallback if leaf.is_meta else leaf.device
        # "cuda" is whichever one the tensor is on
        return leaf.device if str(wanted) == leaf.device.type else wanted

    def _require_in_place(self) -> None:
        if not all(map(self._fits, self._tensors)):
            raise ConfigError(
                "a model under FSDP is filled as it is: load without dtype and device, and after to_empty() when it is on the "
                "meta device; or load into the model without FSDP"
            )


def _stored_names(weights: Weights, path: str, opening: Opening) -> dict[str, str]:
    """The stored path of each name of the module that is stored."""
    depth = len(split(path))
    keys = sorted({split(name)[depth] for name in opening.stored.below(path) if name != path})
    if not keys:
        raise MissingNames(
            f"the checkpoint has nothing below {path!r}; its top-level keys are {opening.stored.children('')}. Give key=",
            missing=[path],
            unexpected=[],
        )
    found: dict[str, str] = {}
    for key in keys:
        at = below(path, key)
        name = key if weights.new_name is None else weights.new_name(key)
        if name is None:
            opening.used.update(opening.stored.below(at))
            continue
        if type(name) is not str:
            raise ConfigError(f"rename= made {name!r} of {key!r}: it has to be a name, or None for what is not wanted")
        if name in found and opening.stored.tensor(found[name]) != opening.stored.tensor(at):
            raise DuplicateName(f"rename= makes {name!r} of {found[name]!r} and of {at!r}", name=name)
        found[name] = at
    return found


def _check_kind(name: str, place: torch.Tensor | Placed, opening: Opening) -> None:
    """Convert floating point to floating point only."""
    found = opening.stored.tensor(name)
    if found is None:
        return
    target = place.data.dtype
    stored = dtype_named(found[1].dtype)
    if stored != target and not (stored.is_floating_point and target.is_floating_point):
        raise DtypeMismatch(
            f"{name!r} is {found[1].dtype} in the checkpoint and {dtype_name(target)} in the model, and only floating point is "
            "converted. Build the model with the stored dtype",
            name=name,
            stored=found[1].dtype,
            target=dtype_name(target),
        )


def _constant(value: Any) -> Finish:
    return lambda: value
