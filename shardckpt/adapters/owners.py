# SPDX-License-Identifier: Apache-2.0
"""Leaves of a state for training that keeps its master weights apart from the module that computes with them.

Such as DeepSpeed's ZeRO: flat tensors, cut up over the ranks, stand for many parameters each. Whoever knows where each
parameter lies in them says so with these; `partitioned` saves and loads them as a module and its optimizer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..describe import Placed
from .wrappers import Slot


class SlotOwner(ABC):
    """Says which parameters lie in the tensors that an optimizer updates."""

    @abstractmethod
    def parameter_slots(self) -> Iterator[tuple[torch.Tensor, list[Slot]]]:
        """Each tensor that the optimizer updates, and the parameters in it."""


class PartitionedModel:
    """A module whose parameters are saved from other memory than the module's own."""

    def __init__(
        self,
        module: nn.Module,
        leaves: Mapping[int, Placed],
        *,
        lists_buffers: bool,
        strict: bool = True,
        may_miss: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.module = module
        self.leaves = leaves
        """By id of the module's parameter: this rank's part of what is saved of it. What is not in here is left out."""
        self.lists_buffers = lists_buffers
        """Whether this rank saves buffers and extra states; they may differ between ranks, and those of one rank count."""
        self.strict = strict
        """Whether a load refuses names that are missing in the checkpoint, or that the module does not have."""
        self.may_miss = may_miss
        """Whether a parameter of this name may be missing in the checkpoint even so."""


class PartitionedOptimizer(SlotOwner):
    """An optimizer that updates tensors in which several parameters lie, and param groups that list all of them."""

    def __init__(
        self,
        optimizer: Optimizer,
        groups: list[dict[str, Any]],
        slots: list[tuple[torch.Tensor, list[Slot]]],
        *,
        frozen: Collection[str] = (),
        only_steps_write: bool = True,
    ) -> None:
        self.optimizer = optimizer
        """Holds the state and takes the step."""
        self.param_groups = groups
        """The optimizer's own, or ones that list parameters which the optimizer has only while it takes a step."""
        self.frozen = frozen
        """Names of parameters that it does not list, though other trainers may list them in a group."""
        self.only_steps_write = only_steps_write
        """Whether nothing but the optimizer's steps writes to its parameters and state."""
        self._slots = slots

    @property
    def state(self) -> MutableMapping[Any, Any]:
        """State by parameter."""
        return self.optimizer.state

    def parameter_slots(self) -> Iterator[tuple[torch.Tensor, list[Slot]]]:
        yield from self._slots

    def settle(self) -> None:
        """Hand hyperparameters that were loaded to the optimizer's own groups."""
        for own, group in zip(self.optimizer.param_groups, self.param_groups, strict=True):
            if own is not group:
                own.update({key: value for key, value in group.items() if key != "params"})


class Received:
    """A part of a target that takes all that is stored there: nothing is missing or unexpected."""

    def __init__(self) -> None:
        self.value: Any = None
        """What was stored, as plain CPU tensors and values; None when there was nothing."""
