# SPDX-License-Identifier: Apache-2.0
"""Where an engine of DeepSpeed keeps the master weights of each parameter, and how its parameters follow from them.

The attributes used here are those of DeepSpeed 0.19 (``runtime/zero/stage_1_and_2.py``, ``runtime/zero/stage3.py``,
``runtime/bf16_optimizer.py``, ``runtime/fp16/*_optimizer.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ...adapters.fsdp1 import cut
from ...adapters.owners import PartitionedModel, PartitionedOptimizer
from ...adapters.wrappers import NameCleaner, Slot
from ...describe import Placed
from ...layout import FlatLayout, Replicated

Groups = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Master:
    """A tensor that the optimizer updates."""

    tensor: torch.Tensor
    """This rank's part."""
    params: list[nn.Parameter]
    """The module's parameters that lie in it."""
    slots: list[Slot]
    """Where each of them lies."""


class Masters:
    """The masters of an engine that trains the module's own parameters: ZeRO stage 0 in fp32, or no optimizer at all."""

    def __init__(self, engine: Any) -> None:
        self.wrapper = engine.optimizer
        """DeepSpeed's optimizer, which may wrap one of torch."""
        self.module: nn.Module = engine.module
        self.names = _names(engine.module)
        """Name of each parameter of the module, by id."""

    @property
    def optimizer(self) -> Optimizer | None:
        """The one that takes the step."""
        return self.wrapper if isinstance(self.wrapper, Optimizer) else None

    def masters(self) -> list[Master]:
        """All that the optimizer updates."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        params = [param for group in groups for param in group["params"] if id(param) in self.names]
        return [Master(param, [param], [Slot(self.names[id(param)])]) for param in params]

    def groups(self) -> Groups:
        """The param groups of `optimizer`, with all parameters."""
        assert self.optimizer is not None
        return self.optimizer.param_groups

    def other(self, param: Any) -> Placed:
        """A parameter without a master."""
        return Placed(param, Replicated(tuple(param.shape)))

    def make_parameters(self) -> None:
        """Make the parameters that are computed with from the masters. Collective."""

    # ---- what goes into a state

    def model(
        self, *, frozen: bool = True, strict: bool = True, may_miss: Callable[[str], bool] = lambda name: False
    ) -> PartitionedModel:
        """The module with its masters; without its frozen parameters, if so wanted."""
        leaves: dict[int, Placed] = {}
        rank = dist.get_rank()
        for master in self.masters():
            for param, slot in zip(master.params, master.slots, strict=True):
                leaves[id(param)] = _placed(master.tensor, slot, rank)
        for param in self.module.parameters():
            if id(param) not in leaves and (frozen or param.requires_grad):
                leaves[id(param)] = self.other(param)
        return PartitionedModel(self.module, leaves, lists_buffers=rank == 0, strict=strict, may_miss=may_miss)

    def partitioned_optimizer(self) -> PartitionedOptimizer | None:
        """The optimizer with its groups and slots; None when there is none."""
        if self.optimizer is None:
            return None
        groups = self.groups()
        return PartitionedOptimizer(
            self.optimizer,
            groups,
            [(master.tensor, master.slots) for master in self.masters()],
            frozen=self.frozen,
            # DeepSpeed puts Muon's momentum together before the optimizer's step
            only_steps_write=not any(group.get("use_muon") for group in groups),
        )

    @property
    def frozen(self) -> set[str]:
        """Names of the parameters that are not trained."""
        return {self.names[id(param)] for param in self.module.parameters() if not param.requires_grad}


class WrappedMasters(Masters):
    """Masters of an optimizer that DeepSpeed wraps."""

    @property
    def optimizer(self) -> Optimizer | None:
        inner: Optimizer = self.wrapper.optimizer
        return inner


class UnfusedMasters(WrappedMasters):
    """``FP16_UnfusedOptimizer`` (stage 0): a master of the same shape for each parameter, on all ranks."""

    def masters(self) -> list[Master]:
        pairs = zip(self.wrapper.fp16_groups, self.wrapper.fp32_groups, strict=True)
        found = [pair for params, masters in pairs for pair in zip(params, masters, strict=True)]
        return [Master(master, [param], [Slot(self.names[id(param)])]) for param, master in found]

    def make_parameters(self) -> None:
        for master in self.masters():
            master.params[0].data.copy_(master.tensor.data)


class FusedMasters(WrappedMasters):
    """``FP16_Optimizer`` (stage 0): the parameters of a group one behind the other, on all ranks."""

    def masters(self) -> list[Master]:
        found = []
        for flat, params in zip(self.wrapper.fp32_groups_flat, self.wrapper.fp16_groups, strict=True):
            slots, at = [], 0
            for param in params:
                slots.append(Slot(self.names[id(param)], Replicated(tuple(param.shape)), at, param.numel()))
                at += param.numel()
            found.append(Master(flat, params, slots))
        return found

    def make_parameters(self) -> None:
        for master in self.masters():
            for param, slot in zip(master.params, master.slots, strict=True):
                param.data.copy_(master.tensor.data.narrow(0, slot.offset, slot.numel).view(param.shape))


class FlatMasters(WrappedMasters):
    """ZeRO stages 1 and 2 and ``BF16_Optimizer``: the ravel of a group's parameters, cut into equal parts."""

    def masters(self) -> list[Master]:
        found = []
        for at, flat in enumerate(self.partitions):
            ranks, here = _ranks(self.wrapper.real_dp_process_group[at])
            params = self.params(at)
            spans = zip(params, self.offsets(at, params), strict=True)
            slots = [_slot(self.names[id(p)], p.shape, start, flat.numel(), ranks, here) for p, start in spans]
            found.append(Master(flat, params, slots))
        return found

    @property
    def partitions(self) -> list[torch.Tensor]:
        """This rank's part of each group."""
        parts: list[torch.Tensor] = self.wrapper.single_partition_of_fp32_groups
        return parts

    def params(self, at: int) -> list[nn.Parameter]:
        """Parameters of a group in the order in which they lie in it."""
        params: list[nn.Parameter] = self.wrapper.round_robin_bit16_groups[at]
        return params

    def offsets(self, at: int, params: list[nn.Parameter]) -> list[int]:
        """First element of each of ``params`` in the group."""
        offsets: list[int] = self.wrapper.round_robin_bit16_offsets[at]
        return offsets

    def make_parameters(self) -> None:
        self.wrapper.update_lp_params()
        # what DeepSpeed's functions to look at a parameter's state go by
        self.wrapper._link_all_hp_params()
        self.wrapper._hp_optimizer_states_linked = False


class BF16Masters(FlatMasters):
    """``BF16_Optimizer``: stage 1 in bf16 that accumulates gradients in fp32."""

    @property
    def partitions(self) -> list[torch.Tensor]:
        parts: list[torch.Tensor] = self.wrapper.fp32_groups_flat_partition
        return parts

    def params(self, at: int) -> list[nn.Parameter]:
        params: list[nn.Parameter] = self.wrapper.bf16_groups[at]
        return params

    def offsets(self, at: int, params: list[nn.Parameter]) -> list[int]:
        starts = [0]
        for param in params:
            starts.append(starts[-1] + param.numel())
        return starts[:-1]


class ParameterPartitions(Masters):
    """ZeRO stage 3 without an optimizer: each parameter cut into equal parts for itself."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._cut: dict[Any, Slot] = {}
        """By shape and process group: all ranks are listed in a layout, and few shapes are different."""

    @property
    def optimizer(self) -> Optimizer | None:
        return None

    def masters(self) -> list[Master]:
        return []

    def other(self, param: Any) -> Placed:
        return _placed(param.ds_tensor, self.slot(param, 0), dist.get_rank())

    def slot(self, param: Any, base: int) -> Slot:
        """Where a parameter lies, from element ``base`` on of this rank's tensor."""
        key = (param.ds_shape, param.ds_process_group)
        if key not in self._cut:
            ranks, here = _ranks(param.ds_process_group)
            self._cut[key] = _slot("", param.ds_shape, 0, param.partition_numel(), ranks, here)
        slot = self._cut[key]
        return replace(slot, fqn=self.names[id(param)], offset=slot.offset + base)

    def make_parameters(self) -> None:
        self.wrapper.partition_all_parameters()
        persistent = self.wrapper.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)


class Stage3Masters(ParameterPartitions):
    """ZeRO stage 3: each parameter cut into equal parts, which lie one behind the other in the tensor of a sub-group."""

    @property
    def optimizer(self) -> Optimizer | None:
        inner: Optimizer = self.wrapper.optimizer
        return inner

    def masters(self) -> list[Master]:
        found = []
        for flat, params in zip(self.wrapper.fp32_partitioned_groups_flat, self.wrapper.fp16_groups, strict=True):
            slots, base = [], 0
            for param in params:
                slots.append(self.slot(param, base))
                base += param.partition_numel()
            found.append(Master(flat, params, slots))
        return found

    def groups(self) -> Groups:
        assert self.optimizer is not None
        # DeepSpeed lists a sub-group's tensor only while the optimizer steps over it
        groups = [{**group, "params": list[torch.Tensor]()} for group in self.optimizer.param_groups]
        for at, flat in enumerate(self.wrapper.fp32_partitioned_groups_flat):
            groups[self.wrapper.sub_group_to_group_id[at]]["params"].append(flat)
        return groups

    def make_parameters(self) -> None:
        self.wrapper.checkpoint_event_prologue()
        for at in range(len(self.wrapper.fp16_groups)):
            self.wrapper._reassign_or_swap_out_partitioned_parameters(at)
        self.wrapper.checkpoint_event_epilogue()


def masters_of(engine: Any) -> Masters:
    """The masters of an engine that `require_supported` has let pass."""
    wrapper = engine.optimizer
    # what DeepSpeed makes of an engine that is not trained
    is_dummy = type(getattr(wrapper, "optimizer", wrapper)).__name__ == "DummyOptim"
    kind = Masters if is_dummy else _KINDS.get(type(wrapper).__name__, Masters)
    return kind(engine)


_KINDS: dict[str, type[Masters]] = {
    "DeepSpeedZeroOptimizer": FlatMasters,
    "BF16_Optimizer": BF16Masters,
    "FP16_Optimizer": FusedMasters,
    "FP16_UnfusedOptimizer": UnfusedMasters,
    "DeepSpeedZeroOptimizer_Stage3": Stage3Masters,
    "DeepSpeedZeRoOffload": ParameterPartitions,
}
KNOWN = frozenset(_KINDS)
"""Classes of DeepSpeed's optimizers that there are masters for."""


def _names(module: nn.Module) -> dict[int, str]:
    cleaner = NameCleaner(module)
    names: dict[int, str] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), cleaner.clean(name))
    return names


def _ranks(group: Any) -> tuple[list[int], int]:
    """Global ranks of a group, and this rank's place in it."""
    return dist.get_process_group_ranks(group), dist.get_rank(group)


def _slot(name: str, shape: torch.Size, start: int, size: int, ranks: list[int], here: int) -> Slot:
    """A parameter from element ``start`` on of a flat tensor, of which each rank has ``size`` elements."""
    stop = start + shape.numel()
    if start == stop:
        return Slot(name, Replicated(tuple(shape)))
    ranges = tuple(
        (ranks[at], max(start, at * size) - start, min(stop, (at + 1) * size) - start)
        for at in range(start // size, -(-stop // size))
    )
    first, last = max(start, here * size), min(stop, (here + 1) * size)
    return Slot(name, FlatLayout(tuple(shape), ranges), max(first - here * size, 0), max(last - first, 0))


def _placed(tensor: torch.Tensor, slot: Slot, rank: int) -> Placed:
    if slot.layout is None:
        return Placed(tensor, Replicated(tuple(tensor.shape)))
    return cut(tensor, slot, rank)
