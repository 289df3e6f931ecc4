# SPDX-License-Identifier: Apache-2.0
"""What ZeRO wrote: from flat partitions of ranks to parameters with names and shapes.

After ``deepspeed/utils/zero_to_fp32.py`` and ``state_dict`` of ``runtime/zero/stage_1_and_2.py``, ``stage3.py`` beside it and
``runtime/bf16_optimizer.py``. At stages 1 and 2 the parameters of a group lie one after the other, in the order of
``param_shapes``, and that is cut into equal partitions; at stage 3 each parameter is cut into equal parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from ...errors import InvalidForeignCheckpoint, UnsupportedForeignCheckpoint
from ...layout import Ints
from .arrays import Array, Slice, array_of, assemble
from .classes import TensorRef, require_shape
from .directory import Files

Shapes = Sequence[Mapping[str, Ints]]


@dataclass
class Trained:
    """What an optimizer trains, by the names of parameters."""

    masters: dict[str, Array] = field(default_factory=dict)
    """Weights."""
    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Optimizer state: arrays and values."""
    groups: list[dict[str, Any]] = field(default_factory=list)
    """Hyperparameters."""
    group_of: dict[str, int] = field(default_factory=dict)
    """Number of the group of each parameter."""
    stage: int = 0
    """Of ZeRO."""
    common: dict[str, Any] = field(default_factory=dict)
    """What else stands in the optimizer's file of rank 0: the loss scaler, say."""


def shapes_of(model: Mapping[str, Any]) -> list[dict[str, Ints]]:
    """``param_shapes``: by group or sub-group, names and shapes in the order in which they lie."""
    found = model.get("param_shapes")
    listed = [found] if isinstance(found, dict) else found
    if not isinstance(listed, list) or not all(isinstance(group, dict) for group in listed):
        raise UnsupportedForeignCheckpoint(
            "there is no 'param_shapes' that says which parameters lie where in the flat partitions: DeepSpeed before 0.3.16 "
            "wrote none, and training without ZeRO writes none. Load it in DeepSpeed with ZeRO and save it again, or convert "
            "it with its own zero_to_fp32.py"
        )
    return [{name: require_shape(shape) for name, shape in group.items()} for group in listed]


def owners_of(groups: Sequence[Mapping[str, Any]], count: int) -> dict[int, int]:
    """The number of the group of each of ``count`` flat tensors, as far as the groups name them."""
    return {n: at for at, group in enumerate(groups) for n in group["params"] if type(n) is int and 0 <= n < count}


def read_trained(files: Files, model: Mapping[str, Any]) -> Trained:
    """All that the partitions of all ranks hold. Raises `InvalidForeignCheckpoint` when they do not fit together."""
    shapes = shapes_of(model)
    ranks = [files.read(files.optimizer[rank])["optimizer_state_dict"] for rank in range(len(files.optimizer))]
    stage = ranks[0].get("zero_stage", 1)
    counts = ranks[0].get("partition_count", len(ranks))
    counts = counts if isinstance(counts, list) else [counts]
    if max(counts) != len(ranks) or min(counts) != len(ranks) or any(r.get("zero_stage", 1) != stage for r in ranks):
        raise InvalidForeignCheckpoint(
            f"{files.place}: rank 0 saved with {max(counts)} ranks, and there are {len(ranks)} files of partitions: some are "
            "of another save with the same tag, or were not copied. Import another tag",
            wanted=max(counts),
            got=len(ranks),
        )
    return _Partitions(files, ranks, stage, shapes).read()


class _Partitions:
    def __init__(self, files: Files, ranks: Sequence[Mapping[str, Any]], stage: int, shapes: Shapes) -> None:
        self._files = files
        self._ranks = ranks
        self._stage = stage
        self._shapes = shapes
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        self._flats = [self._flat_tensors(rank, key) for rank in ranks]
        self._states = [self._states_of(rank) for rank in ranks]

    def _flat_tensors(self, rank: Mapping[str, Any], key: str) -> list[TensorRef]:
        flats = rank.get(key)
        if not isinstance(flats, list) or not all(isinstance(t, TensorRef) and len(t.shape) == 1 for t in flats):
            raise InvalidForeignCheckpoint(f"{self._files.place}: a file of partitions has no list of flat tensors {key!r}")
        if len(flats) != len(self._shapes):
            raise InvalidForeignCheckpoint(
                f"{self._files.place}: {len(flats)} flat tensors for {len(self._shapes)} groups of parameters in the model's "
                "file: they are of different saves. Import another tag"
            )
        return flats

    def _base(self, rank: Mapping[str, Any]) -> Any:
        return rank.get("optimizer_state_dict" if self._stage == 3 else "base_optimizer_state")

    def _states_of(self, rank: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Optimizer state of each flat tensor."""
        base = self._base(rank)
        # a list where elastic_checkpoint is on
        state = dict(enumerate(base)) if isinstance(base, list) else base["state"]
        return [state.get(number, {}) for number in range(len(self._shapes))]

    def read(self) -> Trained:
        trained = Trained(stage=self._stage, common=dict(self._ranks[0]))
        base = self._base(self._ranks[0])
        if not isinstance(base, list):
            trained.groups = [dict(group) for group in base["param_groups"]]
        owner = owners_of(trained.groups, len(self._shapes))
        for number, shapes in enumerate(self._shapes):
            slices = self._slices3(number, shapes) if self._stage == 3 else self._slices(number, shapes)
            for name, shape, cuts in slices:
                flats = [(cut, self._flats[cut.rank][cut.group]) for cut in cuts]
                trained.masters[name] = assemble(name, shape, flats)
                trained.states[name] = self._state(name, shape, cuts)
                trained.group_of[name] = owner.get(number, number)
        return trained

    def _slices(self, number: int, shapes: Mapping[str, Ints]) -> Iterator[tuple[str, Ints, list[Slice]]]:
        world, sizes = len(self._ranks), [flats[number].numel for flats in self._flats]
        # the first partition is padded only where it holds all there is
        partition = max(sizes)
        paddings = self._ranks[0].get("param_alignment_paddings")
        gaps = paddings[number] if paddings else [0] * len(shapes)
        at = 0
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            cuts, begin, end = [], at, at + prod(shape)
            while begin < end:
                rank = begin // partition if partition else world
                count = min(end, (rank + 1) * partition) - begin
                if rank >= world:
                    raise self._mismatch(end, sum(sizes))
                cuts.append(Slice(rank, number, begin - rank * partition, begin - at, count))
                begin += count
            yield name, shape, cuts
            at = end + gap
        align = 2 * world
        if -(-at // align) != -(-sum(sizes) // align):
            raise self._mismatch(at, sum(sizes))

    def _slices3(self, number: int, shapes: Mapping[str, Ints]) -> Iterator[tuple[str, Ints, list[Slice]]]:
        world, at = len(self._ranks), 0
        for name, shape in shapes.items():
            size, numel = -(-prod(shape) // world), prod(shape)
            starts = [min(rank * size, numel) for rank in range(world + 1)]
            yield (
                name,
                shape,
                [Slice(r, number, at, starts[r], starts[r + 1] - starts[r]) for r in range(world) if starts[r] < numel],
            )
            at += size
        for flats in self._flats:
            if flats[number].numel != at:
                raise self._mismatch(at, flats[number].numel)

    def _mismatch(self, wanted: int, got: int) -> InvalidForeignCheckpoint:
        return InvalidForeignCheckpoint(
            f"{self._files.place}: the parameters need {wanted} elements of flat tensors, and there are {got}: files are of "
            "different saves, or of a world size that they were not written at. Import another tag",
            wanted=wanted,
            got=got,
        )

    def _state(self, name: str, shape: Ints, cuts: Sequence[Slice]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if not cuts:
            return found
        first = self._states[cuts[0].rank][cuts[0].group]
        for key, value in first.items():
            flat = self._flats[cuts[0].rank][cuts[0].group]
            if not isinstance(value, TensorRef):
                found[key] = value
            elif len(value.shape) == 1 and value.numel >= flat.numel:
                found[key] = assemble(name, shape, [(cut, self._state_flat(name, key, cut)) for cut in cuts])
            elif value.numel == 1:
                found[key] = array_of(name, value)
            else:
                raise UnsupportedForeignCheckpoint(
                    f"{self._files.place}: state {key!r} of shape {list(value.shape)} for flat parameters of {flat.numel} "
                    "elements does not belong to elements of them, so it is not known which parameter it is of",
                    name=name,
                    key=key,
                )
        return found

    def _state_flat(self, name: str, key: str, cut: Slice) -> TensorRef:
        value = self._states[cut.rank][cut.group].get(key)
        if not isinstance(value, TensorRef) or len(value.shape) != 1:
            raise InvalidForeignCheckpoint(
                f"{self._files.place}: rank {cut.rank} has no optimizer state {key!r} for its part of {name!r}",
                name=name,
                key=key,
            )
        return value
