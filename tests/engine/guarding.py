# SPDX-License-Identifier: Apache-2.0
"""A small net, and copies that are pending for as long as may be, for tests of what waits for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import shardckpt

BATCH = torch.linspace(-1, 1, 8 * 4).reshape(8, 4)


class Net(nn.Module):
    """Tied weights, buffers that the forward pass changes, and a parameter that training leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(torch.relu(self.norm(self.first(x))))
        return y


class FakePending:
    """A copy that is always pending; remembers whether the tensors were still as they had been when somebody waited."""

    def __init__(self, tensors: Iterator[torch.Tensor]) -> None:
        self._tensors = list(tensors)
        self._before = [tensor.detach().clone() for tensor in self._tensors]
        self.intact: list[bool] = []
        self.errors: list[Exception] = []

    @property
    def is_intact(self) -> bool:
        return all(torch.equal(now, before) for now, before in zip(self._tensors, self._before, strict=True))

    def wait_before_change(self) -> None:
        self.intact.append(self.is_intact)

    def fail(self, error: Exception) -> None:
        self.errors.append(error)


class Wrapper(torch.optim.Optimizer):
    """As the optimizers of Accelerate and others: one in another, whose own initializer is never called."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.state = optimizer.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step()


def backward(net: nn.Module) -> torch.Tensor:
    loss: torch.Tensor = net(BATCH).square().mean()
    loss.backward()
    return loss


class Late(shardckpt.Checkpointer):
    """The worst moment for every change: nothing that is staged lazily is copied before a step waits for it."""

    _LAZY_THREADS = 0
