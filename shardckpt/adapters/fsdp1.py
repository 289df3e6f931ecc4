# SPDX-License-Identifier: Apache-2.0
"""FullyShardedDataParallel (FSDP1): read straight from its flat parameters.

A flat parameter is the ravel of several parameters, cut into equal parts over a process group; where each parameter lies
in it is known on every rank. So each one is a flat layout over this rank's own memory: nothing is gathered, nothing is
copied, no collective runs, and loading fills the memory in place. ``torch.distributed.checkpoint.state_dict`` would
all-gather each parameter to cut it anew along its first dimension. The attributes used here are private ones of torch
that have not changed since 2.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..describe import Placed, Whereabouts
from ..layout import FlatLayout, Replicated
from .loaded import is_fsdp1
from .wrappers import NameCleaner, Slot


def entries(root: nn.Module, path: str, here: Whereabouts) -> Iterator[tuple[str, str, Any]]:
    """(plain name, name, leaf) of all parameters, persistent buffers and extra states."""
    cleaner = NameCleaner(root)
    managed: set[tuple[int, str]] = set()
    for prefix, module in _flat_modules(root):
        flat = module._handle.flat_param
        leaves = {}
        for info, slot in zip(flat._param_infos, _slots(module, prefix, cleaner), strict=True):
            managed.add((id(info.module), info.param_name))
            leaves[id(info.module), info.param_name] = leaf = _leaf(module._handle, slot, here)
            yield slot.fqn, slot.fqn, leaf
        for shared in flat._shared_param_infos:
            managed.add((id(shared.module), shared.param_name))
            leaf = leaves[id(shared.prim_module), shared.prim_param_name]
            name = cleaner.clean(".".join(filter(None, (prefix, shared.module_name, shared.param_name))))
            yield name, name, leaf
    for name, module in root.named_modules():
        yield from _unmanaged(module, cleaner.clean(name), managed)


def parameter_slots(root: nn.Module) -> Iterator[tuple[torch.Tensor, list[Slot]]]:
    """What an optimizer may hold: flat parameters, the parameters in them, and those that FSDP ignores."""
    cleaner = NameCleaner(root)
    managed: set[int] = set()
    for prefix, module in _flat_modules(root):
        slots = _slots(module, prefix, cleaner)
        flat = module._handle.flat_param
        managed.add(id(flat))
        yield flat, slots
        for param, slot in zip(flat._params or (), slots, strict=bool(flat._params)):
            managed.add(id(param))
            # without sharding, the parameters keep their own shapes
            yield param, [replace(slot, offset=0) if module._handle.uses_sharded_strategy else Slot(slot.fqn)]
    for name, param in root.named_parameters():
        if id(param) not in managed:
            yield param, [Slot(cleaner.clean(name))]


def set_extra_states(root: nn.Module, state: dict[str, Any]) -> None:
    """Hand extra states to the modules that they are of."""
    cleaner = NameCleaner(root)
    for name, module in root.named_modules():
        key = ".".join(filter(None, (cleaner.clean(name), "_extra_state")))
        if key in state:
            module.set_extra_state(state[key])


def _flat_modules(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """FSDP modules that have a flat parameter, with their names."""
    for name, module in root.named_modules():
        if is_fsdp1(module) and getattr(module, "_handle", None) is not None:
            yield name, module


def _slots(module: Any, prefix: str, cleaner: NameCleaner) -> list[Slot]:
    """Where each parameter lies in a flat one."""
    handle = module._handle
    flat = handle.flat_param
    here = handle.rank if handle.uses_sharded_strategy else 0
    size = local_shard(handle).numel()
    stored = _is_first_replica(module)
    slots = []
    for fqn, shape, start in zip(flat._fqns, flat._shapes, _starts(flat), strict=True):
        layout, stop = _layout(handle, tuple(shape), start, size), start + shape.numel()
        first, last = max(start, here * size), min(stop, (here + 1) * size)
        name = cleaner.clean(f"{prefix}.{fqn}" if prefix else fqn)
        slots.append(Slot(name, layout, max(first - here * size, 0), max(last - first, 0), stored))
    return slots


def _starts(flat: Any) -> list[int]:
    """First element of each parameter in the unsharded flat parameter; alignment padding lies between some."""
    starts, at = [], 0
    for numel, is_padding in zip(flat._numels_with_padding, flat._is_padding_mask, strict=True):
        if not is_padding:
            starts.append(at)
        at += numel
    return starts


def _is_first_replica(module: Any) -> bool:
    """Whether this rank is in the first of the groups that each hold all shards (hybrid sharding)."""
    replicas = getattr(module, "_inter_node_pg", None)
    return replicas is None or dist.get_rank(replicas) == 0


def local_shard(handle: Any) -> torch.Tensor:
    """This rank's part of a flat parameter, whatever is gathered at the moment."""
    shard: torch.Tensor = getattr(handle.flat_param, "_local_shard", handle.flat_param.data)
    return shard if handle.uses_sharded_strategy else handle.flat_param.data


def _layout(handle: Any, shape: tuple[int, ...], start: int, size: int) -> FlatLayout | Replicated:
    """The ranges of one parameter on all ranks that hold some of it."""
    if not handle.uses_sharded_strategy:
        return Replicated(shape)
    stop = start + torch.Size(shape).numel()
    ranges = []
    for at in range(start // size, -(-stop // size)):
        first, last = max(start, at * size), min(stop, (at + 1) * size)
        ranges.append((dist.get_global_rank(handle.process_group, at), first - start, last - start))
    return FlatLayout(shape, tuple(ranges))


def _leaf(handle: Any, slot: Slot, here: Whereabouts) -> Placed:
    return cut(local_shard(handle), slot, here.rank)


def cut(flat: torch.Tensor, slot: Slot, rank: int) -> Placed:
    """The part of one parameter in ``flat``, which is the local part of a flat parameter or of its optimizer state."""
    assert slot.layout is not None
    piece = slot.layout.piece(rank)
    if piece is None:
        return Placed(flat[:0], slot.layout, slot.stored)
    return Placed(flat.narrow(0, slot.offset, slot.numel).view(piece.shape), slot.layout, slot.stored)


def _unmanaged(module: nn.Module, name: str, managed: set[tuple[int, str]]) -> Iterator[tuple[str, str, Any]]:
    prefix = f"{name}." if name else ""
    for key, param in module._parameters.items():
        if param is not None and (id(module), key) not in managed and not getattr(param, "_is_flat_param", False):
            yield prefix + key, prefix + key, param
    for key, buffer in module._buffers.items():
        if buffer is not None and key not in module._non_persistent_buffers_set:
            yield prefix + key, prefix + key, buffer
    if type(module).get_extra_state is not nn.Module.get_extra_state and not is_fsdp1(module):
        yield prefix + "_extra_state", prefix + "_extra_state", module.get_extra_state()
