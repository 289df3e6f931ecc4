# SPDX-License-Identifier: Apache-2.0
"""Modules: plain, DDP, FSDP2, tensor-parallel, compiled, activation-checkpointed; FSDP1 is in `fsdp1`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..describe import Placed, Whereabouts
from ..errors import DuplicateName
from . import fsdp1
from .adapter import Adapter
from .base import Finish, Nothing, below
from .loaded import is_fsdp1
from .opening import Opening
from .saving import Saving
from .wrappers import NameCleaner, unwrap

EXTRA_STATE = "_extra_state"


class ModuleAdapter(Adapter):
    """Parameters, persistent buffers and extra state under their plain names, as state_dict has them."""

    def takes(self, value: object) -> bool:
        return isinstance(value, nn.Module)

    def expand(self, value: Any, path: str, saving: Saving) -> Any:
        owners = broadcast_owners(value)
        tree: dict[str, Any] = {}
        for name, _, leaf in entries(value, path, saving.here):
            if owners.get(id(leaf), saving.here.rank) == saving.here.rank:
                tree[name] = leaf
        return tree or Nothing

    def module(self, value: Any) -> nn.Module:
        """The module that ``value`` is or has."""
        module: nn.Module = value
        return module

    def entries(self, value: Any, path: str, here: Whereabouts) -> Iterator[tuple[str, str, Any]]:
        """(plain name, name in state_dict, leaf) of all that is loaded into ``value``."""
        return entries(value, path, here)

    def is_wanted(self, value: Any, name: str, path: str, opening: Opening) -> bool:
        """Whether ``name`` is to be loaded, and missing if it is not stored."""
        return True

    def open(self, value: Any, path: str, opening: Opening, *, per_rank: bool) -> Finish:
        module = self.module(value)
        live = _live_storages(module)
        handed: dict[str, Finish] = {}
        for name, raw, leaf in self.entries(value, path, opening.here):
            at = below(path, name)
            if not self.is_wanted(value, name, path, opening):
                continue
            if is_extra_state(name) or not isinstance(leaf, torch.Tensor | Placed):
                finish = opening.adopt(at, leaf, opening.allocate_host, per_rank=per_rank)
                if finish is not None:
                    handed[raw] = finish
                elif not opening.stored.below(at):
                    opening.miss(at)
            elif opening.tensor(at, leaf, per_rank=per_rank) and not _is_live(leaf, live):
                handed[raw] = _constant(leaf)

        def put_back() -> Any:
            if handed:
                hand_over(unwrap(module), {raw: finish() for raw, finish in handed.items()})
            return value

        return put_back


def entries(module: nn.Module, path: str, here: Whereabouts) -> Iterator[tuple[str, str, Any]]:
    """(plain name, name in state_dict, leaf) of all that the module's state_dict has; tensors are the live ones.

    Raises DuplicateName when two names are equal once what wrappers add is taken out.
    """
    root = unwrap(module)
    if any(map(is_fsdp1, root.modules())):
        yield from fsdp1.entries(root, path, here)
        return
    cleaner = NameCleaner(root)
    seen: dict[str, str] = {}
    # FSDP2 has hooks in state_dict that reshard parameters which are gathered at the moment
    for raw, leaf in root.state_dict(keep_vars=True).items():
        name = cleaner.clean(raw)
        if name in seen:
            raise DuplicateName(
                f"{path!r}: {seen[name]!r} and {raw!r} are both named {name!r} without what wrappers add to names",
                name=name,
            )
        seen[name] = raw
        yield name, raw, leaf


def is_extra_state(name: str) -> bool:
    """Whether a name in a state_dict is that of a module's extra state, whose type and size may change."""
    return name.rpartition(".")[2] == EXTRA_STATE


def broadcast_owners(module: nn.Module) -> dict[int, int]:
    """By id: the buffers that DDP broadcasts before each forward pass, and the rank whose values count.

    Between two broadcasts, ranks have other values (BatchNorm statistics of their own batches).
    """
    owners: dict[int, int] = {}
    for wrapper in module.modules():
        if isinstance(wrapper, DistributedDataParallel) and wrapper.broadcast_buffers:
            rank = dist.get_global_rank(wrapper.process_group, 0)
            ignored = wrapper.parameters_to_ignore
            owners |= {id(buffer): rank for name, buffer in wrapper.module.named_buffers() if name not in ignored}
    return owners


def _live_storages(module: nn.Module) -> set[int]:
    return {_storage(tensor) for tensors in (module.parameters(), module.buffers()) for tensor in tensors}


def _storage(tensor: torch.Tensor) -> int:
    local = getattr(tensor, "_local_tensor", tensor)
    return id(local) if local.layout is not torch.strided else local.untyped_storage()._cdata


def _is_live(leaf: Any, live: set[int]) -> bool:
    """Whether filling ``leaf`` changes the module; hooks may put copies into a state_dict."""
    return isinstance(leaf, Placed) or _storage(leaf) in live


def _constant(value: Any) -> Finish:
    return lambda: value


def hand_over(root: nn.Module, state: dict[str, Any], *, assign: bool = False) -> None:
    """Give a module what cannot be filled in place: extra state, what hooks made, and, to ``assign``, new tensors."""
    if any(map(is_fsdp1, root.modules())):
        fsdp1.set_extra_states(root, state)
    else:
        root.load_state_dict(state, strict=False, assign=assign)
