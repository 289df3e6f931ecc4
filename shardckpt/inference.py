# SPDX-License-Identifier: Apache-2.0
"""`load_for_inference`: the weights of a checkpoint in a model that is only to be run, whatever layout they were trained in."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from glob import escape
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from .adapters.weights import Weights
from .coordinate import Coordinator
from .errors import ConfigError
from .events import Sink
from .loading import Load, Restored
from .options import Options
from .root import find_checkpoint
from .store import open_store
from .targets import Selection
from .tree import split

Rename = Callable[[str], str | None]
"""The name in the model of a name in the checkpoint; None for one that is not wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceConfig:
    """How `load_for_inference` makes a model ready. Values that make no sense raise `ConfigError`."""

    dtype: torch.dtype | None = None
    """Floating-point dtype of parameters and persistent buffers; None leaves each as the model has it. Stored values are
    converted while they are loaded; integers stay integers."""
    device: torch.device | str | None = None
    """Where the model is to lie; None leaves it where it is, and puts what is on the meta device on the CPU, or on the devices
    of the mesh that it is cut up over."""
    mesh: DeviceMesh | None = None
    """One-dimensional: the model is cut up over it first, by ``parallelize_module``. Without, a model that is tensor-parallel
    already is filled as it is."""
    plan: ParallelStyle | Mapping[str, ParallelStyle] | None = None
    """How, as ``parallelize_module`` takes it; together with ``mesh``."""
    rename: Rename | Mapping[str, str | None] | None = None
    """What names in the checkpoint are in the model: a function of one name, or a mapping of prefixes, of which the longest
    that fits is replaced; None in place of a name leaves it out. ``{"backbone.": "", "value_head.": None}``."""
    strict: bool = True
    """Whether names that are missing or unexpected are an error; else ``.info`` tells them, and those that are missing keep
    their values, which `MissingNames` asks for when they are on the meta device."""
    key: str = "model"
    """Where in the saved state the model was, such as ``"model"`` or ``"ema/model"``."""
    expect_digest: str | None = None
    """The digest that `save` returned; any other manifest is refused."""
    options: Options | None = None
    """Of the load: deadline, threads, whether ranks pass on what they read."""

    def __post_init__(self) -> None:
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise ConfigError(f"dtype={self.dtype!r} is no floating-point dtype of torch, such as torch.bfloat16 (or None)")
        device = self.torch_device
        if self.mesh is not None and not (isinstance(self.mesh, DeviceMesh) and self.mesh.ndim == 1):
            raise ConfigError(
                f"mesh={self.mesh!r} is no DeviceMesh of one dimension; of a larger one take it by name: mesh['tp']"
            )
        if (self.mesh is None) != (self.plan is None):
            raise ConfigError("mesh and plan go together: the one says over which ranks, the other how each module is cut")
        if device is not None and self.mesh is not None and device.type != self.mesh.device_type:
            raise ConfigError(
                f"device={str(device)!r} and a mesh of {self.mesh.device_type} devices do not fit; leave device out"
            )
        if type(self.strict) is not bool:
            raise ConfigError(f"strict={self.strict!r} is not True or False")
        self._check_rename()
        self._check_key()

    @property
    def torch_device(self) -> torch.device | None:
        """``device`` as torch has it."""
        try:
            device = None if self.device is None else torch.device(self.device)
        except (RuntimeError, TypeError):
            raise ConfigError(f"device={self.device!r} is no device of torch, such as 'cuda' (or None)") from None
        if device is not None and device.type == "meta":
            raise ConfigError("device='meta' holds no values; leave device out to get a model that is there on a real one")
        return device

    @property
    def renamer(self) -> Rename | None:
        """``rename`` as a function."""
        if not isinstance(self.rename, Mapping):
            return self.rename
        new, prefixes = self.rename, sorted(self.rename, key=len, reverse=True)

        def rename(name: str) -> str | None:
            prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
            if prefix is None:
                return name
            start = new[prefix]
            return None if start is None else start + name[len(prefix) :]

        return rename

    def _check_rename(self) -> None:
        rename = self.rename
        if isinstance(rename, Mapping):
            is_fit = all(type(old) is str and (new is None or type(new) is str) for old, new in rename.items())
        else:
            is_fit = rename is None or callable(rename)
        if not is_fit:
            raise ConfigError(f"rename={rename!r} is neither a function of a name nor a mapping of prefixes (or None)")

    def _check_key(self) -> None:
        try:
            split(self.key)
        except (AttributeError, ValueError, TypeError):
            raise ConfigError(f"key={self.key!r} is no name in a state, such as 'model' or 'ema/model'") from None


def default_inference_config() -> InferenceConfig:
    """What `load_for_inference` goes by when it is given nothing else; `dataclasses.replace` makes another one of it."""
    return InferenceConfig()


def load_for_inference(url: str | os.PathLike[str], model: nn.Module, config: InferenceConfig | None = None) -> Restored:
    """Load the weights of the checkpoint at ``url``, or of the newest step of a root, into ``model``, ready to be run.

    Collective, on any number of ranks. ``model`` is plain, on the meta device (it then gets memory for what it holds here and
    no more), tensor-parallel, or made so by ``config``; the checkpoint is of any kind of training: plain, DDP, FSDP,
    tensor-parallel, DeepSpeed's ZeRO. Only what this needs is read: nothing of the optimizer, and of each tensor the parts that
    this rank holds, widened to whole digest blocks; ``.info`` of the result counts the bytes. Tied weights stay tied, and
    buffers are loaded too, but for those that no checkpoint holds, which are moved to the device and keep their dtype. The
    model is put into eval mode; ``requires_grad`` stays as it is. ``.state`` of the result holds the model under
    ``config.key``.

    Raises `CheckpointNotFound`, `MissingNames`, `ShapeMismatch` and the other errors of `shardckpt.load`; `DtypeMismatch` when
    one of two dtypes is not floating-point; `StateError` for buffers on the meta device that no checkpoint holds;
    `DuplicateName` when ``rename`` makes one name of two; `ConfigError` for a model under FSDP that has to change its dtype or
    device. When it raises, do not use the model.
    """
    config = default_inference_config() if config is None else config
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={model!r} is no torch.nn.Module")
    if not isinstance(config, InferenceConfig):
        raise ConfigError(f"config={config!r} is no shardckpt.InferenceConfig")
    options = Options.of(config.options)
    store = open_store(url)
    keys = [f"{escape(config.key)}/*"]
    selection = Selection(keys=keys, strict=config.strict, convert_dtype=True, expect_digest=config.expect_digest)
    with Coordinator.connect(timeout=options.timeout) as coordinator:
        prefix = coordinator.broadcast("load: find", lambda: find_checkpoint(store).encode()).decode()
        if config.mesh is not None:
            plan = dict(config.plan) if isinstance(config.plan, Mapping) else config.plan
            parallelize_module(model, config.mesh, plan)
        state: Any = Weights(model, config.dtype, config.torch_device, config.renamer)
        for name in reversed(split(config.key)):
            state = {name: state}
        restored = Load(coordinator, store, prefix, selection, options, Sink()).run(state)
    model.eval()
    return restored
