# SPDX-License-Identifier: Apache-2.0
"""Types of torch whose modules take seconds to import: where the module is not loaded, nothing is of such a type."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_dtensor(value: object) -> TypeIs[DTensor]:
    """Whether ``value`` is a DTensor."""
    return isinstance(value, _found("torch.distributed.tensor", "DTensor"))


def is_async_tensor(value: object) -> TypeIs[AsyncCollectiveTensor]:
    """Whether ``value`` is what a collective under way will have made."""
    return isinstance(value, _found("torch.distributed._functional_collectives", "AsyncCollectiveTensor"))


def is_fsdp1(value: object) -> TypeIs[FullyShardedDataParallel]:
    """Whether ``value`` is a FullyShardedDataParallel wrapper."""
    return isinstance(value, _found("torch.distributed.fsdp", "FullyShardedDataParallel"))


def is_fsdp2(value: object) -> TypeIs[FSDPModule]:
    """Whether ``value`` is a module that ``fully_shard`` was called for."""
    return isinstance(value, _found("torch.distributed.fsdp", "FSDPModule"))


def _found(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, ())
