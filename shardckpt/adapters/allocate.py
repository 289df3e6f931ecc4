# SPDX-License-Identifier: Apache-2.0
"""Memory for optimizer state that does not exist yet, made from what a checkpoint holds."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.optim import Optimizer

from ..errors import StateError
from ..tree import StoredTensor, split
from .dtypes import dtype_named
from .loaded import is_dtensor


class StateAllocator:
    """Makes the state tensors of one parameter, as its optimizer would have them."""

    def __init__(self, optimizer: Optimizer, group: dict[str, Any], param: torch.Tensor, path: str, rank: int) -> None:
        self._optimizer = optimizer
        self._rank = rank
        self._group = group
        self._param = param
        self._path = path
        self._own: Any = None

    def __call__(self, name: str, stored: StoredTensor) -> torch.Tensor:
        """The tensor to read ``name`` into.

        State of the parameter's shape is laid out as the parameter. Single numbers lie where Optimizer.load_state_dict
        puts them: ``step`` in host memory unless the group is fused or capturable, others on the parameter's device.
        """
        shape, dtype = stored.shape(self._rank) or (), dtype_named(stored.dtype)
        param = self._param.detach()
        keys = split(name)[len(split(self._path)) :]
        if shape == tuple(param.shape) and keys[-1:] != ["step"]:
            return torch.empty_like(param, dtype=dtype)
        if shape == ():
            on_device = keys[-1:] != ["step"] or self._group.get("fused") or self._group.get("capturable")
            return torch.empty((), dtype=dtype, device=param.device if on_device else "cpu")
        if not is_dtensor(param):
            return torch.empty(shape, dtype=dtype, device=param.device)
        return self._from_own_state(name, keys, shape, dtype)

    def _from_own_state(self, name: str, keys: list[str], shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Sharded state of another shape than its parameter: only the optimizer knows how it is laid out."""
        if self._own is None:
            try:
                self._own = zero_step_state(self._optimizer, self._group, self._param)
            except Exception as error:  # whatever the step of a user's optimizer may raise
                raise StateError(
                    f"{name!r}: the checkpoint has optimizer state of shape {shape} for a sharded parameter of shape "
                    f"{tuple(self._param.shape)}, and the optimizer could not show where that lies: a step on zeros failed "
                    f"({type(error).__name__}: {error}). Take one step before loading, so that the state exists.",
                    name=name,
                ) from error
        found = self._own
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        if not isinstance(found, torch.Tensor) or tuple(found.shape) != shape:
            got = "none" if found is None else f"one of shape {tuple(found.shape)}"
            raise StateError(
                f"{name!r}: the checkpoint has optimizer state of shape {shape}, but for a parameter of shape "
                f"{tuple(self._param.shape)} this optimizer makes {got}. Use the optimizer that the checkpoint was saved "
                "with, or take one step before loading.",
                name=name,
            )
        return torch.empty_like(found, dtype=dtype)


def zero_step_state(optimizer: Optimizer, group: dict[str, Any], param: torch.Tensor) -> dict[str, Any]:
    """The state that ``optimizer`` makes for ``param``: from one step on a stand-in, with zero gradient and learning rate.

    Neither the parameter nor anything else of the optimizer changes, and its step hooks do not run. For sharded
    parameters the step may run collectives, so all ranks of the mesh have to come here, in the same order.
    """
    stand_in = torch.zeros_like(param.detach()).requires_grad_(True)
    stand_in.grad = torch.zeros_like(stand_in)
    lr = group.get("lr", 0.0)
    lone = {**group, "params": [stand_in], "lr": torch.zeros_like(lr) if isinstance(lr, torch.Tensor) else 0.0}
    groups, optimizer.param_groups = optimizer.param_groups, [lone]
    step = type(optimizer).step
    try:
        # torch wraps step() to run hooks; what it wraps is the optimizer's own
        cast("Any", getattr(step, "__wrapped__", step))(optimizer)
        made: dict[str, Any] = optimizer.state.pop(stand_in, {})
    finally:
        optimizer.param_groups = groups
        optimizer.state.pop(stand_in, None)
    return made
