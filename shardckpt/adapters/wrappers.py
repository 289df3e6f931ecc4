# SPDX-License-Identifier: Apache-2.0
"""What wrappers of modules add to names, and how to take it out again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from ..layout import FlatLayout, Replicated
from .loaded import is_fsdp1, is_fsdp2

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Parts of names that torch.compile, activation checkpointing and FSDP1 add."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One named parameter, and where it lies in what the optimizer updates."""

    fqn: str
    """Name of the parameter in its module."""
    layout: FlatLayout | Replicated | None = None
    """In a flat parameter: how this one is cut up over ranks; else the optimizer updates the parameter itself."""
    offset: int = 0
    """In a flat parameter: first element in this rank's part of it."""
    numel: int = 0
    """In a flat parameter: number of elements that this rank holds."""
    stored: bool = True
    """In a flat parameter: whether this rank takes part in saving it, as the first of the replicas does."""


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside of DDP, DataParallel and torch.compile wrappers."""
    while True:
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            module = module.module
        elif isinstance(inner := module._modules.get("_orig_mod"), nn.Module):
            module = inner
        else:
            return module


def reshard(root: nn.Module) -> None:
    """Free parameters that FSDP holds gathered at the moment, as its own state_dict does."""
    for module in root.modules():
        if is_fsdp2(module):
            module.reshard()
        elif is_fsdp1(module):
            from torch.distributed.fsdp._runtime_utils import _reshard

            handle: Any = module._handle
            # before the first forward pass there is no buffer for gathered parameters yet
            if handle is not None and hasattr(handle.flat_param, "_full_param_padded") and not handle.needs_unshard():
                _reshard(module, handle, True)


class NameCleaner:
    """Takes what wrappers add out of the names below one module, so that wrapping does not change names."""

    def __init__(self, root: nn.Module) -> None:
        self._prefixes = sorted(
            (
                f"{name}.module." if name else "module."
                for name, module in root.named_modules(remove_duplicate=False)
                if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel)
            ),
            key=len,
            reverse=True,
        )

    def clean(self, name: str) -> str:
        """The plain name."""
        for prefix in self._prefixes:
            if name.startswith(prefix):
                name = prefix.removesuffix("module.") + name.removeprefix(prefix)
        return strip_wrappers(name)


@lru_cache(maxsize=1 << 16)
def strip_wrappers(name: str) -> str:
    """``name`` without the parts that wrappers add by themselves."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
