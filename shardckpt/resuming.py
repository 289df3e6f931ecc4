# SPDX-License-Identifier: Apache-2.0
"""`resume`: one call from a model to a training run that goes on where it was."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .engines import get_checkpoint_engine
from .errors import ConfigError, told
from .loading import Restored
from .options import Options

OptimizerCallable = Callable[[Iterable[torch.Tensor] | Iterable[dict[str, Any]]], Optimizer]
"""Makes an optimizer of parameters, or of param groups, such as ``functools.partial(torch.optim.AdamW, lr=3e-4)``."""
SchedulerCallable = Callable[[Optimizer], LRScheduler]
"""Makes a scheduler of an optimizer, such as ``functools.partial(StepLR, step_size=30)``."""

NAMES = ("model", "optimizer", "scheduler")
"""The top-level keys of a state that `resume` and other callers share."""


class Resumed(NamedTuple):
    """What `resume` returns."""

    model: nn.Module
    """The one that was given."""
    optimizer: Any
    """Given or made; None without."""
    scheduler: Any
    """Given or made; None without."""
    restored: Restored | None
    """The checkpoint that was restored; None when there was none."""


def resume(
    root: str | os.PathLike[str],
    model: nn.Module,
    *,
    optimizer: Optimizer | OptimizerCallable | None = None,
    scheduler: LRScheduler | SchedulerCallable | None = None,
    extra: Mapping[str, Any] | None = None,
    step: int | None = None,
    strict: bool = True,
    convert_dtype: bool = False,
    expect_digest: str | None = None,
    fallback: bool = False,
    engine: str = "sync",
    options: Options | None = None,
) -> Resumed:
    """Make the optimizer and the scheduler, and restore the newest step of ``root``, or ``step``, into them and the model.

    Collective. Wrap the model first (DDP, FSDP, tensor parallelism). An ``optimizer`` that is a callable is given the list of
    the model's parameters that require grad, a ``scheduler`` that is one the optimizer; objects are used as they are. The state
    is ``{"model": model, "optimizer": optimizer, "scheduler": scheduler, **extra}``, without what there is not: what a
    `Checkpointer` saves under these names, this restores, on any world size. Values of ``extra`` are written back into it when
    it is a mutable mapping. ``engine`` is a name for `get_checkpoint_engine`. The other arguments are those of
    `Checkpointer.restore`, as are the errors; `ConfigError` is raised for what is neither an object of its kind nor makes one.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={told(model)} is no torch.nn.Module")
    extra = _check_extra(extra)
    optimizer = _make_optimizer(model, optimizer)
    scheduler = _make_scheduler(optimizer, scheduler)
    parts = dict(zip(NAMES, (model, optimizer, scheduler), strict=True))
    state = {**{name: part for name, part in parts.items() if part is not None}, **extra}
    arguments: dict[str, Any] = {} if options is None else {"options": options}
    with get_checkpoint_engine(engine, root, **arguments) as opened:
        restored = opened.load(
            state, step=step, strict=strict, convert_dtype=convert_dtype, expect_digest=expect_digest, fallback=fallback
        )
    if restored is not None and isinstance(extra, MutableMapping):
        extra.update({name: restored.state[name] for name in extra})
    return Resumed(model, optimizer, scheduler, restored)


def _check_extra(extra: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if extra is None:
        return {}
    if not (isinstance(extra, Mapping) and all(type(key) is str for key in extra)):
        raise ConfigError(f"extra={told(extra)} is not a mapping with str keys; write extra={{'rng': shardckpt.RNGState()}}")
    taken = sorted({*NAMES} & {*extra})
    if taken:
        raise ConfigError(f"extra has {taken}: these names are those of the arguments; take other ones")
    return extra


def _make_optimizer(model: nn.Module, optimizer: Any) -> Any:
    if optimizer is None or _has_state(optimizer):
        return optimizer
    if not callable(optimizer):
        raise ConfigError(
            f"optimizer={told(optimizer)} is neither an optimizer nor a function that makes one of parameters, such as "
            "functools.partial(torch.optim.AdamW, lr=3e-4)"
        )
    parameters = [param for param in model.parameters() if param.requires_grad]
    if not parameters:
        raise ConfigError(
            "optimizer= is to be called, but no parameter of the model requires grad: unfreeze some, or leave it out"
        )
    return _require_state("optimizer", optimizer(parameters))


def _make_scheduler(optimizer: Any, scheduler: Any) -> Any:
    if scheduler is None or _has_state(scheduler):
        return scheduler
    if not callable(scheduler):
        raise ConfigError(
            f"scheduler={told(scheduler)} is neither a scheduler nor a function that makes one of an optimizer, such as "
            "functools.partial(torch.optim.lr_scheduler.StepLR, step_size=30)"
        )
    if optimizer is None:
        raise ConfigError("scheduler is to be made, but there is no optimizer to make it of; give optimizer= too")
    return _require_state("scheduler", scheduler(optimizer))


def _has_state(value: object) -> bool:
    """Whether this is an object that can be restored; classes have the methods too."""
    methods = (getattr(value, name, None) for name in ("state_dict", "load_state_dict"))
    return not isinstance(value, type) and all(map(callable, methods))


def _require_state(argument: str, made: Any) -> Any:
    if not _has_state(made):
        raise ConfigError(f"{argument}= was called and made {told(made)}, which has no state_dict and load_state_dict")
    return made
