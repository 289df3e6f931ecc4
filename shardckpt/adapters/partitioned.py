# SPDX-License-Identifier: Apache-2.0
"""Modules and optimizers whose parameters are saved from partitions of flat tensors, under the names that plain ones have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..describe import Placed, Whereabouts
from .adapter import Adapter
from .base import Finish, Nothing, below
from .module import ModuleAdapter, entries, is_extra_state
from .opening import Opening
from .optimizer import OptimizerAdapter, Parts
from .owners import PartitionedModel, PartitionedOptimizer, Received
from .saving import Saving


class PartitionedModelAdapter(ModuleAdapter):
    """`PartitionedModel`: parameters from where its leaves say, all else from the module."""

    def takes(self, value: object) -> bool:
        return isinstance(value, PartitionedModel)

    def module(self, value: PartitionedModel) -> nn.Module:
        return value.module

    def entries(self, value: PartitionedModel, path: str, here: Whereabouts) -> Iterator[tuple[str, str, Any]]:
        for name, raw, leaf in entries(value.module, path, here):
            if id(leaf) in value.leaves:
                yield name, raw, value.leaves[id(leaf)]
            elif is_extra_state(name) or not isinstance(leaf, nn.Parameter):
                yield name, raw, leaf

    def expand(self, value: PartitionedModel, path: str, saving: Saving) -> Any:
        found = self.entries(value, path, saving.here)
        tree = {name: leaf for name, _, leaf in found if isinstance(leaf, Placed) or value.lists_buffers}
        return tree or Nothing

    def open(self, value: PartitionedModel, path: str, opening: Opening, *, per_rank: bool) -> Finish:
        finish = super().open(value, path, opening, per_rank=per_rank)
        if not value.strict:
            opening.used.update(opening.stored.below(path))
        return finish

    def is_wanted(self, value: PartitionedModel, name: str, path: str, opening: Opening) -> bool:
        is_stored = bool(opening.stored.below(below(path, name)))
        return is_stored or (value.strict and not value.may_miss(name))


class PartitionedOptimizerAdapter(OptimizerAdapter):
    """`PartitionedOptimizer`: as any optimizer of flat parameters."""

    def takes(self, value: object) -> bool:
        return isinstance(value, PartitionedOptimizer)

    def parts(self, value: PartitionedOptimizer, path: str) -> Parts:
        return Parts(value.optimizer, value.param_groups, lambda _: True, value.settle)

    def open(self, value: PartitionedOptimizer, path: str, opening: Opening, *, per_rank: bool) -> Finish:
        for fqn in value.frozen:
            source = opening.value(below(path, "group_of", fqn))
            if source is not None:
                opening.used.add(below(path, "group_of", fqn))
                opening.used.update(opening.stored.below(below(path, "param_groups", source)))
        return super().open(value, path, opening, per_rank=per_rank)


class ReceivedAdapter(Adapter):
    """`Received`: driven by the checkpoint alone."""

    def takes(self, value: object) -> bool:
        return isinstance(value, Received)

    def expand(self, value: Received, path: str, saving: Saving) -> Any:
        return Nothing

    def open(self, value: Received, path: str, opening: Opening, *, per_rank: bool) -> Finish:
        finish = opening.adopt(path, None, opening.allocate_host, per_rank=per_rank)

        def put_back() -> Received:
            value.value = finish() if finish is not None else None
            return value

        return put_back
