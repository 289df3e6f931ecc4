# SPDX-License-Identifier: Apache-2.0
"""What may be copied while training goes on, what makes training wait for the copy, and what tells when nothing did.

Tensors that an optimizer owns change in its steps only, and before each step a hook runs. So these are copied late, and the
hook waits for the copy. Whatever changes them behind the hook's back is found by comparing versions.
"""

from __future__ import annotations

import logging
import os
import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from ctypes import string_at
from itertools import chain
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .adapters.base import PerRank
from .adapters.loaded import is_dtensor
from .adapters.owners import PartitionedModel, PartitionedOptimizer

logger = logging.getLogger("shardckpt")
_PLAIN = (torch.Tensor, nn.Parameter)
_PROBE = 16
"""Bytes that are compared at each of three places in a tensor."""


# ---- who owns what


class Owned:
    """Memory that nothing but steps of optimizers is expected to write to."""

    def __init__(self, tensors: Iterable[torch.Tensor] = ()) -> None:
        self.tensors = list(tensors)
        """As the optimizers hold them: their version counters count the steps, those of aliases need not."""
        ranges: defaultdict[torch.device, list[tuple[int, int]]] = defaultdict(list)
        for tensor in self.tensors:
            for memory in _memories(tensor):
                start, stop, is_dense = _extent(memory)
                # what lies between the elements of any other tensor may be somebody else's
                if is_dense:
                    ranges[memory.device].append((start, stop))
        self._ranges = {device: _merge(found) for device, found in ranges.items()}

    def __call__(self, tensor: torch.Tensor) -> bool:
        """Whether all of a plain tensor lies in this memory."""
        # without a version counter nobody could tell whether it was changed
        if tensor.is_inference() or tensor.device not in self._ranges:
            return False
        starts, stops = self._ranges[tensor.device]
        start, stop, _ = _extent(tensor)
        at = bisect_right(starts, start) - 1
        return at >= 0 and stop <= stops[at]


def owned_by_optimizers(state: Mapping[str, Any]) -> Owned:
    """The memory of parameters and state of all optimizers in ``state`` whose steps call the hooks of `StepGuard`.

    To be asked after `capture`, which brings sharded parameters back to their places.
    """
    renormed: set[int] = set()
    # by id: schedulers name theirs again
    optimizers: dict[int, Optimizer | PartitionedOptimizer] = {}
    for leaf in _leaves(state, set()):
        if isinstance(leaf, PartitionedModel):
            renormed.update(_changed_by_forward(leaf.module))
        elif isinstance(leaf, nn.Module):
            renormed.update(_changed_by_forward(leaf))
        else:
            optimizers.update((id(optimizer), optimizer) for optimizer in _hooked(leaf))
    tensors = chain.from_iterable(map(_tensors, optimizers.values()))
    return Owned(tensor for tensor in tensors if id(tensor) not in renormed)


def _leaves(value: Any, seen: set[int]) -> Iterator[Any]:
    """Everything in a state that is no container."""
    if isinstance(value, PerRank):
        value = value.value
    # most are tensors, and to find that they are no mappings takes longer
    if isinstance(value, torch.Tensor) or not isinstance(value, Mapping | list | tuple):
        yield value
    elif id(value) not in seen:
        seen.add(id(value))
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(item, seen)


def _changed_by_forward(module: nn.Module) -> Iterator[int]:
    """Ids of parameters that a forward pass writes to."""
    for child in module.modules():
        if isinstance(child, nn.Embedding | nn.EmbeddingBag) and child.max_norm is not None:
            yield id(child.weight)


def _hooked(value: Any) -> Iterator[Optimizer | PartitionedOptimizer]:
    """The optimizers that ``value`` is or wraps, if their steps call global hooks."""
    if isinstance(value, PartitionedOptimizer) and not value.only_steps_write:
        return
    attributes = getattr(value, "__dict__", {})
    inner = attributes.get("optim", attributes.get("optimizer"))
    if isinstance(inner, Optimizer):
        yield from _hooked(inner)
        # such as ZeroRedundancyOptimizer, which has more parameters than its inner one
        if isinstance(value, Optimizer | PartitionedOptimizer):
            yield value
    elif isinstance(value, Optimizer) and inner is None and hasattr(type(value).step, "hooked"):
        yield value


def _tensors(optimizer: Optimizer | PartitionedOptimizer) -> Iterator[torch.Tensor]:
    """Parameters and state."""
    for group in optimizer.param_groups:
        yield from group["params"]
    for leaf in _leaves(optimizer.state, set()):
        if isinstance(leaf, torch.Tensor):
            yield leaf


def _memories(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    """The plain tensors that ``tensor`` (a DTensor, for one) consists of, as far as they have memory."""
    if is_dtensor(tensor):
        tensor = tensor._local_tensor
    if type(tensor) not in _PLAIN and hasattr(tensor, "__tensor_flatten__"):
        parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        # newer DTensors name their mesh too
        return chain.from_iterable(_memories(part) for part in parts if isinstance(part, torch.Tensor))
    return (tensor,) if torch._C._has_storage(tensor) and tensor.numel() and not tensor.is_inference() else ()


def _extent(tensor: torch.Tensor) -> tuple[int, int, bool]:
    """First byte in memory, the one behind the last, and whether nothing lies between the elements, whatever their order."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes, True
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + span * tensor.itemsize, span == tensor.numel()


def _merge(ranges: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Starts and stops of the ranges, ascending; those that overlap or touch are one."""
    starts: list[int] = []
    stops: list[int] = []
    for start, stop in sorted(ranges):
        if stops and start <= stops[-1]:
            stops[-1] = max(stops[-1], stop)
        else:
            starts.append(start)
            stops.append(stop)
    return starts, stops


# ---- what was changed


class Versions:
    """What tensors were at one moment, as far as it takes to tell later which of them were changed in place.

    Two signs count: torch's version counters, and a few bytes of each tensor in host memory, because fused optimizers, writes
    through ``.data``, and kernels from outside of torch count no versions. Bytes on a GPU are not looked at: that would wait
    for all that is queued there.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], owners: Iterable[torch.Tensor]) -> None:
        self._tensors = tensors
        self._owners = list(owners)
        self._counts = {name: _count(tensor) for name, tensor in tensors.items()}
        self._owner_counts = [_count(owner) for owner in self._owners]
        self._probes = {name: _probe(tensor) for name, tensor in tensors.items() if tensor.is_cpu}

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], owners: Iterable[torch.Tensor] = ()) -> Versions:
        """Look at plain ``tensors`` by name, and at what optimizers have of the same memory (`Owned.tensors`)."""
        return cls(tensors, owners)

    def changed(self) -> list[str]:
        """Names of the tensors that were changed, sorted."""
        found = {name for name, tensor in self._tensors.items() if _count(tensor) != self._counts[name]}
        found.update(name for name, probe in self._probes.items() if _probe(self._tensors[name]) != probe)
        counts = zip(self._owners, self._owner_counts, strict=True)
        stepped = [owner for owner, count in counts if _count(owner) != count]
        if stepped:
            is_stepped = Owned(stepped)
            found.update(name for name, tensor in self._tensors.items() if is_stepped(tensor))
        return sorted(found)


def _probe(tensor: torch.Tensor) -> tuple[int, bytes]:
    """Where a tensor in host memory begins, and some of its bytes: the first, those in the middle, and the last."""
    start, stop, is_dense = _extent(tensor)
    if not start or not tensor.numel():
        return start, b""
    if not is_dense:
        return start, string_at(start, tensor.itemsize)
    if stop - start <= 3 * _PROBE:
        return start, string_at(start, stop - start)
    middle = (start + stop - _PROBE) // 2
    return start, string_at(start, _PROBE) + string_at(middle, _PROBE) + string_at(stop - _PROBE, _PROBE)


def _count(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


# ---- what waits


class Pending(Protocol):
    """A copy of tensors that optimizers own, made while training goes on."""

    def wait_before_change(self) -> None:
        """Return when the tensors may be changed. Called in any thread, and in several at once."""

    def fail(self, error: Exception) -> None:
        """Hear that the tensors are going to be changed although `wait_before_change` raised ``error``."""


class StepGuard:
    """Makes every optimizer step of this process wait for pending copies. Any thread may use it.

    Its hook is global: hooks of an instance run later, and not for optimizers inside of others.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: tuple[Pending, ...] = ()
        self._process = 0
        self._attached = 0
        self._hook: Any = None

    def attach(self) -> None:
        """Put the hook in place. It stays until as many calls of `detach`."""
        with self._lock:
            self._attached += 1
            self._put_in_place()

    def detach(self) -> None:
        """Take back one `attach`; not while a step runs, which goes through the hooks one by one."""
        with self._lock:
            self._attached -= 1
            if self._attached == 0 and self._hook is not None:
                self._hook.remove()
                self._hook = None

    def watch(self, pending: Pending) -> None:
        """Have all steps from now on wait for ``pending``."""
        with self._lock:
            self._put_in_place()
            others = self._pending if self._process == os.getpid() else ()
            self._pending = (*others, pending)
            self._process = os.getpid()

    def forget(self, pending: Pending) -> None:
        """Have no step wait for ``pending`` any more; no matter if none does. The hook stays: a step may be just in it."""
        with self._lock:
            self._pending = tuple(other for other in self._pending if other is not pending)

    def wait(self) -> None:
        """Wait for all pending copies, as before a step: for whatever else is about to write to what optimizers own."""
        # a forked process, such as a data loader's, has neither the copies nor the threads that make them
        if self._process != os.getpid():
            return
        for pending in self._pending:
            try:
                pending.wait_before_change()
            except Exception as error:
                logger.exception("waiting for a state to be staged failed: training goes on, and the save will fail")
                self.forget(pending)
                pending.fail(error)

    def _put_in_place(self) -> None:
        if self._hook is None:
            # Not to be compiled: it has to run anew, and before anything of the step, each time that a compiled step runs.
            disable: Any = torch.compiler.disable
            self._hook = register_optimizer_step_pre_hook(disable(self._before_step))

    def _before_step(self, *_: object) -> None:
        self.wait()


STEP_GUARD = StepGuard()
"""The one of this process."""
