# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of DeepSpeed as the state that plain training would have saved: one tree of names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ...adapters.base import container_of, is_value_leaf
from ...adapters.optimizer import NOT_STORED, group_name
from ...adapters.wrappers import strip_wrappers
from ...errors import CheckpointError, InvalidForeignCheckpoint, UnsupportedForeignCheckpoint
from ...store import Store
from ...tree import child
from .arrays import Array, Slice, array_of, assemble
from .classes import Opaque, TensorRef, require_shape
from .directory import Files, open_directory
from .universal import read_universal
from .zero import Trained, read_trained

OWN_KEYS = frozenset(
    {
        *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "frozen_param_fragments"),
        *("shared_params", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names"),
        *("csr_tensor_module_names", "skipped_steps", "global_steps", "global_samples", "micro_steps", "dp_world_size"),
        *("mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version", "num_experts", "folding"),
        *("ds_autoep_layers", "autoep_layers", "universal_checkpoint_info", "torch_autocast_gradscaler", "grad_scaler"),
    }
)
"""What DeepSpeed itself puts into the model's file; all else is the caller's client_state."""
_LARGEST = 1 << 63
_MOST_NODES = 1 << 22
_VALUES_PER_PART = 16
"""What one more part of a scattered tensor takes of time and memory."""
_DEEPEST = 60


@dataclass(frozen=True, slots=True)
class Contents:
    """What a directory of DeepSpeed holds."""

    tree: dict[str, Any]
    """The state, with tensors that have no memory in place of those in files."""
    arrays: dict[str, Array]
    """Where the tensors lie, by full name; second names of tied ones too."""
    step: int
    """``global_steps``."""
    tag: str
    """Name of the directory."""
    world_size: int
    """Data-parallel ranks that wrote it."""


def read_contents(store: Store, tag: str | None = None) -> Contents:
    """Read all descriptions, and no tensor. Raises what `directory`, `zero` and `pickles` raise."""
    files = open_directory(store, tag)
    try:
        return _read(files)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise InvalidForeignCheckpoint(
            f"{files.place}: its files do not hold what DeepSpeed writes ({type(error).__name__}: {error}). Import another tag"
        ) from error


def _read(files: Files) -> Contents:
    model = files.read(files.model[0])
    _require_plain(files, model)
    if not files.optimizer and not files.is_universal:
        raise UnsupportedForeignCheckpoint(
            f"{files.place} has no partitions of an optimizer (..._optim_states.pt): training without ZeRO does not store "
            "which parameter its optimizer state belongs to. Load it in DeepSpeed with ZeRO stage 1 and save it again",
        )
    trained = read_universal(files, model) if files.is_universal else read_trained(files, model)
    names = [strip_wrappers(name) for name in trained.masters]
    step = model.get("global_steps")
    world_size = len(files.optimizer) or int(model.get("dp_world_size") or 1)
    if type(step) is not int or not 0 <= step < _LARGEST or not 0 < world_size < _LARGEST or len(set(names)) != len(names):
        raise InvalidForeignCheckpoint(
            f"{files.place}: the file of the model's state has no good global_steps, or a name twice"
        )
    tree: dict[str, Any] = {"model": _model(files, model, trained), "optimizer": _optimizer(trained)}
    if model.get("lr_scheduler") is not None:
        tree["lr_scheduler"] = model["lr_scheduler"]
    tree["deepspeed"] = _counters(files, model, trained)
    client = {key: value for key, value in model.items() if key not in OWN_KEYS}
    if client:
        tree["client_state"] = client
    walk = _Walk()
    standing = {key: walk.visit(child("", key), value, 0) for key, value in tree.items()}
    return Contents(standing, walk.arrays, step, files.tag, world_size)


def _require_plain(files: Files, model: Any) -> None:
    if not isinstance(model, dict) or not isinstance(model.get("module"), dict):
        raise UnsupportedForeignCheckpoint(
            f"{files.place}: the model's file has no 'module': of a pipeline, or of another program"
        )
    experts = model.get("num_experts")
    dims = model.get("checkpoint_parallel_dimensions") or {}
    parallel = max(int(model.get("mp_world_size") or 1), dims.get("tp_degree") or 1, dims.get("pp_degree") or 1)
    if parallel > 1:
        raise UnsupportedForeignCheckpoint(
            f"{files.place}: written with tensor or pipeline parallelism of {parallel}, which is not read"
        )
    if any(experts or ()) or model.get("ds_autoep_layers") or model.get("autoep_layers"):
        raise UnsupportedForeignCheckpoint(f"{files.place}: written with experts (MoE), which are not read")


def _model(files: Files, model: Mapping[str, Any], trained: Trained) -> dict[str, Any]:
    module, shared = model["module"], model.get("shared_params") or {}
    frozen = model.get("frozen_param_shapes") or {}
    fragments = _Frozen(files, model, trained.stage)
    found: dict[str, Any] = {}
    for name in [*module, *frozen, *trained.masters]:
        owner = shared.get(name, name)
        clean = strip_wrappers(name)
        if clean in found:
            continue
        if owner in trained.masters:
            found[clean] = trained.masters[owner]
        elif owner in frozen:
            whole = fragments.array(owner, require_shape(frozen[owner]))
            if whole is not None:
                found[clean] = whole
        else:
            found[clean] = module[name]
    return found


class _Frozen:
    """Parameters that are not trained: whole in the module below stage 3, else in equal parts in the files of all ranks."""

    def __init__(self, files: Files, model: Mapping[str, Any], stage: int) -> None:
        self._files = files
        self._model = model
        self._stage = stage
        self._by_rank: list[Mapping[str, Any]] | None = None
        self._made: dict[str, Array | None] = {}

    def array(self, name: str, shape: tuple[int, ...]) -> Array | None:
        """The parameter; None where it was left out of the save. One object for all its names."""
        if name not in self._made:
            self._made[name] = self._find(name, shape)
        return self._made[name]

    def _find(self, name: str, shape: tuple[int, ...]) -> Array | None:
        for source in (self._model["module"], self._model.get("frozen_param_fragments") or {}):
            tensor = source.get(name)
            if isinstance(tensor, TensorRef) and tensor.shape == shape:
                return array_of(name, tensor)
        if self._stage < 3 or not self._model.get("frozen_param_fragments"):
            return None
        if self._by_rank is None:
            others = [self._files.read(self._files.model[rank]) for rank in range(1, len(self._files.model))]
            self._by_rank = [part.get("frozen_param_fragments") or {} for part in (self._model, *others)]
        world, numel = len(self._by_rank), prod(shape)
        size = -(-numel // world)
        cuts = [Slice(r, 0, 0, r * size, min(size, numel - r * size)) for r in range(world) if r * size < numel]
        flats = [(cut, self._by_rank[cut.rank][name]) for cut in cuts if name in self._by_rank[cut.rank]]
        return assemble(name, shape, flats)


def _optimizer(trained: Trained) -> dict[str, Any]:
    numbers = range(max(trained.group_of.values(), default=-1) + 1)
    groups = trained.groups or [{} for _ in numbers]
    plain = [{key: value for key, value in group.items() if key not in NOT_STORED} for group in groups]
    names = [group_name(at, group, "optimizer") for at, group in enumerate(plain)]
    made: dict[str, Any] = {"param_groups": {name: group for name, group in zip(names, plain, strict=True) if group}}
    made["group_of"] = {strip_wrappers(name): names[number] for name, number in trained.group_of.items()}
    made["state"] = {strip_wrappers(name): state for name, state in trained.states.items() if state}
    return {key: section for key, section in made.items() if section}


def _counters(files: Files, model: Mapping[str, Any], trained: Trained) -> dict[str, Any]:
    found: dict[str, Any] = {
        "global_steps": model["global_steps"],
        "global_samples": model.get("global_samples", 0),
        "skipped_steps": model.get("skipped_steps", 0),
        "zero_stage": trained.stage,
        "dtype": _dtype(files, model),
        "version": str(model.get("ds_version")),
        "parameters": [strip_wrappers(name) for name in [*trained.masters, *(model.get("frozen_param_shapes") or {})]],
    }
    scaler = trained.common.get("loss_scaler")
    if isinstance(scaler, Opaque):
        found["loss_scaler"] = {"class": scaler.name, **{k: v for k, v in scaler.state.items() if not isinstance(v, TensorRef)}}
    found.update({key: model[key] for key in ("data_sampler", "random_ltd") if model.get(key) is not None})
    return found


def _dtype(files: Files, model: Mapping[str, Any]) -> str:
    settings = model.get("ds_config")
    for keys, dtype in ((("bf16", "bfloat16"), "bfloat16"), (("fp16",), "float16")):
        parts = [settings.get(key) for key in keys] if isinstance(settings, dict) else []
        if any(isinstance(part, dict) and part.get("enabled") for part in parts):
            return dtype
    return "bfloat16" if files.prefix == "bf16_" else "float32"


class _Walk:
    """Puts tensors without memory in place of descriptions, and notes where each lies."""

    def __init__(self) -> None:
        self.arrays: dict[str, Array] = {}
        self._standing: dict[int, tuple[Any, torch.Tensor]] = {}
        self._nodes = 0

    def visit(self, path: str, value: Any, depth: int) -> Any:
        """``value``, as it can be captured."""
        self._count(1, path, depth)
        if isinstance(value, TensorRef):
            value = array_of(path, value)
            self._count(_VALUES_PER_PART * (len(value.parts) - 1), path, depth)
        if isinstance(value, Array):
            self.arrays[path] = value
            known = self._standing.get(id(value))
            if known is None:
                # all elements are one place in memory, so that size costs nothing
                known = (value, torch.zeros((), dtype=getattr(torch, value.dtype)).expand(value.shape))
                self._standing[id(value)] = known
            return known[1]
        if isinstance(value, Mapping | list | tuple) and not isinstance(value, torch.Size):
            return self._container(path, value, depth)
        return value

    def _count(self, nodes: int, path: str, depth: int) -> None:
        self._nodes += nodes
        if depth > _DEEPEST or self._nodes > _MOST_NODES:
            raise UnsupportedForeignCheckpoint(
                f"{path!r}: deeper than {_DEEPEST} levels, or part of more than {_MOST_NODES} values"
            )

    def _container(self, path: str, value: Any, depth: int) -> Any:
        if isinstance(value, Mapping):
            texts = dict(zip(value, (container_of(value, path) or ({}, None))[0], strict=True))
            made = {key: self.visit(child(path, texts[key]), item, depth + 1) for key, item in value.items()}
            return value if is_value_leaf(value) else made
        made_list = [self.visit(child(path, str(at)), item, depth + 1) for at, item in enumerate(value)]
        return made_list if isinstance(value, list) else tuple(made_list)
