# SPDX-License-Identifier: Apache-2.0
"""The files of a DeepSpeed checkpoint, as DeepSpeed 0.19 saves them (``runtime/engine.py``, ``_common_checkpoint_state`` and
``_save_zero_checkpoint``; ``state_dict`` of the optimizers in ``zero/stage_1_and_2.py`` and ``zero/stage3.py``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from shardckpt.errors import ExportRefused
from shardckpt.maintain.parts import Leaf

from .content import Content, Window, whole
from .engine_state import FLOAT, EngineState, Group
from .partitions import fragments, partition, partition_size, round_robin, shares, sub_groups
from .pickling import Call, Instance, Name

VERSION = "0.19.8"
"""Of DeepSpeed, whose format it is."""
_STAGE = Name("deepspeed.runtime.zero.config", "ZeroStageEnum")
_FRAGMENT = Name("deepspeed.utils.tensor_fragment", "fragment_address")
_SCALERS = "deepspeed.runtime.fp16.loss_scaler"
_NO_SCALING = {"cur_scale": 1.0, "dynamic": False}
_DYNAMIC = {
    "cur_scale": 2.0**16,
    "cur_iter": 0,
    "last_overflow_iter": -1,
    "scale_factor": 2.0,
    "scale_window": 1000,
    "min_scale": 1,
    "delayed_shift": 2,
    "cur_hysteresis": 2,
    "consecutive_hysteresis": False,
    "raise_error_at_min_scale": True,
    "dynamic": True,
    "dtype": torch.float16,
}
"""What DeepSpeed's configuration of fp16 defaults to."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What kind of directory is wanted."""

    stage: int
    """ZeRO stage, 1 to 3."""
    world_size: int
    """Number of ranks that will load it."""
    dtype: str
    """Name of the dtype of the parameters that are computed with."""
    sub_group_size: int = 10**9
    """``sub_group_size`` of the configuration of stage 3: elements per rank."""
    round_robin: bool = False
    """``round_robin_gradients`` of the configuration of stages 1 and 2."""


def zero_files(state: EngineState, shape: Shape) -> Iterator[tuple[str, Any]]:
    """(file name, value to be pickled), file by file. Raises `ExportRefused`."""
    if shape.round_robin and shape.stage < 3:
        groups = tuple(_in_order(group, round_robin(list(group.weights), shape.world_size)) for group in state.groups)
        state = replace(state, groups=groups)
    if shape.stage < 3:
        empty = [number for number, group in enumerate(state.groups) if not group.weights]
        if empty:
            raise ExportRefused(f"param group {empty[0]} has no parameter to train, which DeepSpeed refuses at stages 1 and 2")
        yield "mp_rank_00_model_states.pt", _model_states(state, shape, 0)
    prefix = "bf16_" if shape.dtype == "bfloat16" else ""
    for rank in range(shape.world_size):
        if shape.stage == 3:
            yield f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", _model_states(state, shape, rank)
        optimizer = _stage3(state, shape, rank) if shape.stage == 3 else _stage12(state, shape, rank)
        value = {"optimizer_state_dict": optimizer, "ds_config": _config(shape), "ds_version": VERSION}
        yield f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", value


def _in_order(group: Group, names: Sequence[str]) -> Group:
    places = {name: at for at, name in enumerate(group.weights)}
    states = {key: tuple(leaves[places[name]] for name in names) for key, leaves in group.states.items()}
    return replace(group, weights={name: group.weights[name] for name in names}, states=states)


def _model_states(state: EngineState, shape: Shape, rank: int) -> dict[str, Any]:
    counters = state.counters
    found: dict[str, Any] = {
        "module": _module(state, shape),
        "buffer_names": [name for name, item in state.others.items() if isinstance(item, Content)],
        "optimizer": None,
        "param_shapes": [_shapes(weights) for weights in _flat_groups(state, shape)],
        "frozen_param_shapes": None,
        "shared_params": dict(state.tied),
        "frozen_param_fragments": None,
        "lr_scheduler": state.lr_scheduler,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": counters.get("skipped_steps", 0),
        "global_steps": counters["global_steps"],
        "dp_world_size": shape.world_size,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": _config(shape),
        "ds_version": VERSION,
    }
    if "global_samples" in counters:
        found["global_samples"] = counters["global_samples"]
    if shape.stage > 1:
        found["frozen_param_shapes"] = OrderedDict((name, torch.Size(item.shape)) for name, item in state.frozen.items())
        found["frozen_param_fragments"] = OrderedDict((name, _fragment(c, shape, rank)) for name, c in state.frozen.items())
    taken = sorted(found.keys() & state.client_state.keys())
    if taken:
        raise ExportRefused(f"client_state has {taken[0]!r}, which DeepSpeed uses itself: rename it", key=taken[0])
    return found | dict(state.client_state)


def _module(state: EngineState, shape: Shape) -> OrderedDict[str, Any]:
    found: OrderedDict[str, Any] = OrderedDict()
    if shape.stage == 3:
        # parameters are loaded from the other files
        found.update((name, Content(shape.dtype, (0,), ())) for group in state.groups for name in group.weights)
        found.update((name, Content(content.dtype, (0,), ())) for name, content in state.frozen.items())
    else:
        found.update((name, whole(leaf, shape.dtype)) for group in state.groups for name, leaf in group.weights.items())
        found.update(state.frozen)
    found.update((name, found[first]) for name, first in state.tied.items())
    found.update(state.others)
    return found


def _fragment(content: Content, shape: Shape, rank: int) -> Content:
    (span,) = content.spans
    if shape.stage < 3 or not isinstance(span, Window):
        return content
    return shares([span.leaf], rank, shape.world_size, content.dtype)


def _shapes(weights: Mapping[str, Leaf]) -> OrderedDict[str, torch.Size]:
    return OrderedDict((name, torch.Size(leaf.shape)) for name, leaf in weights.items())


def _flat_groups(state: EngineState, shape: Shape) -> list[dict[str, Leaf]]:
    """Parameters by the flat tensors that they lie in: those of groups, at stage 3 of sub-groups."""
    if shape.stage < 3:
        return [dict(group.weights) for group in state.groups]
    return [
        dict(list(group.weights.items())[part])
        for group in state.groups
        for part in sub_groups(list(group.weights.values()), shape.world_size, shape.sub_group_size)
    ]


def _stage12(state: EngineState, shape: Shape, rank: int) -> dict[str, Any]:
    masters, states, options, paddings, slices = [], {}, [], [], []
    for number, group in enumerate(state.groups):
        leaves = list(group.weights.values())
        names, size = list(group.weights), partition_size(leaves, shape.world_size)
        master = partition(leaves, rank, size, FLOAT, padded=False)
        masters.append(master)
        paddings.append(size - master.numel)
        flat = {key: partition(each, rank, size, _dtype(each), padded=True) for key, each in group.states.items()} | dict(
            group.scalars
        )
        if flat:
            states[number] = flat
        options.append({**group.options, "params": [number]})
        slices.append(_slices(names, leaves, rank, size))
    scaler = _loss_scaler(state, shape)
    return {
        "loss_scaler": scaler,
        "dynamic_loss_scale": scaler.attributes["dynamic"],
        "overflow": False,
        "base_optimizer_state": {"state": states, "param_groups": options},
        "single_partition_of_fp32_groups": masters,
        "zero_stage": Call(_STAGE, (shape.stage,)),
        "group_paddings": paddings,
        "param_alignment_paddings": [[0] * len(group.weights) for group in state.groups],
        "partition_count": [shape.world_size] * len(state.groups),
        "ds_version": VERSION,
        "param_slice_mappings": slices,
    }


def _slices(names: Sequence[str], leaves: Sequence[Leaf], rank: int, size: int) -> OrderedDict[str, Instance]:
    """Where in a rank's part its elements of each parameter lie."""
    found: OrderedDict[str, Instance] = OrderedDict()
    start = 0
    for at, window in fragments(leaves, rank, size):
        found[names[at]] = Instance(_FRAGMENT, {"numel": window.numel, "start": start})
        start += window.numel
    return found


def _stage3(state: EngineState, shape: Shape, rank: int) -> dict[str, Any]:
    masters: list[Content] = []
    states: dict[int, Any] = {}
    options = []
    for group in state.groups:
        leaves, first = list(group.weights.values()), len(masters)
        for part in sub_groups(leaves, shape.world_size, shape.sub_group_size):
            flat = {key: shares(each[part], rank, shape.world_size, _dtype(each)) for key, each in group.states.items()} | dict(
                group.scalars
            )
            if flat:
                states[len(masters)] = flat
            masters.append(shares(leaves[part], rank, shape.world_size, FLOAT))
        options.append({**group.options, "params": list(range(first, len(masters)))})
    scaler = _loss_scaler(state, shape)
    return {
        "zero_stage": Call(_STAGE, (3,)),
        "loss_scaler": scaler,
        "dynamic_loss_scale": scaler.attributes["dynamic"],
        "overflow": False,
        "partition_count": shape.world_size,
        "optimizer_state_dict": {"state": states, "param_groups": options},
        "fp32_flat_groups": masters,
    }


def _dtype(leaves: Sequence[Leaf]) -> str:
    """Of flat state: DeepSpeed keeps all floating-point state in the dtype of its masters."""
    dtypes = {FLOAT if leaf.tensor.dtype in ("bfloat16", "float16") else leaf.tensor.dtype for leaf in leaves}
    if len(dtypes) > 1:
        raise ExportRefused(f"optimizer state of one param group has the dtypes {sorted(dtypes)}: it cannot be flattened")
    return dtypes.pop()


def _loss_scaler(state: EngineState, shape: Shape) -> Instance:
    """The stored loss scaler, as far as it is one of fp16 and fp16 is asked for; else the one that DeepSpeed begins with."""
    if shape.dtype != "float16":
        return Instance(Name(_SCALERS, "LossScaler"), _NO_SCALING)
    stored = state.counters.get("loss_scaler", {}) if state.counters.get("dtype") == "float16" else {}
    if stored.get("class") == "LossScaler":
        return Instance(Name(_SCALERS, "LossScaler"), _NO_SCALING | {"cur_scale": stored["cur_scale"]})
    known = {key: value for key, value in stored.items() if key in _DYNAMIC}
    return Instance(Name(_SCALERS, "DynamicLossScaler"), _DYNAMIC | known)


def _config(shape: Shape) -> dict[str, Any]:
    found: dict[str, Any] = {"zero_optimization": {"stage": shape.stage}}
    kind = {"bfloat16": "bf16", "float16": "fp16"}.get(shape.dtype)
    return found | ({kind: {"enabled": True}} if kind else {})
