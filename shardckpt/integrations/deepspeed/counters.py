# SPDX-License-Identifier: Apache-2.0
"""What an engine of DeepSpeed counts and adapts while it trains: steps, loss scale, curricula."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ...adapters.base import is_plain
from ...adapters.wrappers import strip_wrappers

logger = logging.getLogger("shardckpt")

_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What a loss scaler changes while it trains; the rest is configuration."""


def counters_of(engine: Any) -> dict[str, Any]:
    """The part ``deepspeed`` of the state, as values and plain tensors."""
    import deepspeed

    found: dict[str, Any] = {
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "zero_stage": int(engine.zero_optimization_stage()),
        "dtype": str(engine.get_data_types()[0]).removeprefix("torch."),
        "version": deepspeed.__version__,
        "parameters": _names_in_order(engine),
    }
    scaler = _loss_scaler(engine)
    if scaler is not None:
        plain = {key: value for key, value in vars(scaler).items() if is_plain(value)}
        found["loss_scaler"] = {"class": type(scaler).__name__, **plain}
    for name, part in _adaptive_parts(engine).items():
        found[name] = _without_arrays(part.state_dict())
    return found


def _names_in_order(engine: Any) -> list[str]:
    """Names of all parameters, those of each param group in the group's order: names alone do not tell it to an export."""
    names: dict[Any, str] = {param: strip_wrappers(name) for param, name in engine.param_names.items()}
    found = [getattr(engine.optimizer, groups, None) for groups in ("bit16_groups", "bf16_groups", "fp16_groups")]
    groups = next(filter(None, found), None) or [
        group["params"] for group in getattr(engine.basic_optimizer, "param_groups", ())
    ]
    ordered = [names[param] for group in groups for param in group]
    known = set(ordered)
    return [*ordered, *(name for name in names.values() if name not in known)]


def set_counters(engine: Any, stored: Mapping[str, Any] | None, step: int, *, optimizer: bool) -> None:
    """Put ``deepspeed`` of a checkpoint back; without one, as plain training writes them, ``step`` counts the steps.

    The loss scale is a part of the optimizer's state, as in DeepSpeed.
    """
    if stored is None:
        logger.info("the checkpoint was not written by DeepSpeed: its step %d becomes engine.global_steps", step)
        stored = {"global_steps": step}
    engine.global_steps = stored["global_steps"]
    engine.global_samples = stored.get("global_samples", engine.global_steps * engine.train_batch_size())
    engine.skipped_steps = stored.get("skipped_steps", 0)
    parts = _adaptive_parts(engine)
    for name, part in parts.items():
        if name == "grad_scaler" and not optimizer:
            continue
        if name in stored:
            part.load_state_dict(_with_arrays(stored[name]))
        else:
            logger.warning("the checkpoint has no state of %s, which stays as it is", name)
    if optimizer:
        _set_loss_scale(_loss_scaler(engine), stored.get("loss_scaler"))


def _loss_scaler(engine: Any) -> Any:
    wrapper = engine.optimizer
    return getattr(wrapper, "loss_scaler", None) or getattr(wrapper, "loss_scale_config", None)


def _set_loss_scale(scaler: Any, stored: Mapping[str, Any] | None) -> None:
    if not _is_dynamic(scaler):
        return
    if stored is None or not (stored.get("dynamic") or stored.get("dynamic_loss_scale")):
        logger.warning("the checkpoint has no dynamic loss scale: it starts anew at %g", scaler.cur_scale)
        return
    for key in _SCALE:
        if key in stored and hasattr(scaler, key):
            setattr(scaler, key, stored[key])


def _is_dynamic(scaler: Any) -> bool:
    return bool(getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False))


def _adaptive_parts(engine: Any) -> dict[str, Any]:
    """What else has a state_dict, by name in the state."""
    parts: dict[str, Any] = {}
    if engine.random_ltd_enabled() and engine.random_ltd_scheduler is not None:
        parts["random_ltd"] = engine.random_ltd_scheduler
    if engine.training_dataloader is not None and engine.curriculum_learning_enabled():
        parts["data_sampler"] = engine.training_dataloader.data_sampler
    scaler = getattr(engine.optimizer, "torch_autocast_gradscaler", None) or engine.torch_autocast_z0_gradscaler
    if scaler:
        parts["grad_scaler"] = scaler
    return parts


def _without_arrays(value: Any) -> Any:
    """NumPy arrays, such as the generator state of data samplers, as mappings of plain lists."""
    if type(value).__module__ == "numpy":
        return {_ARRAY: value.tolist(), "dtype": str(value.dtype)}
    if isinstance(value, dict):
        return {key: _without_arrays(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(_without_arrays, value))
    return value


def _with_arrays(value: Any) -> Any:
    import numpy as np

    if isinstance(value, dict) and _ARRAY in value:
        return np.array(value[_ARRAY], dtype=value["dtype"])[()]
    if isinstance(value, dict):
        return {key: _with_arrays(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(_with_arrays, value))
    return value


_ARRAY = "numpy"
