# SPDX-License-Identifier: Apache-2.0
"""What of DeepSpeed is not saved or loaded, each with the reason."""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError, StateError
from .masters import KNOWN


def require_supported(engine: Any) -> None:
    """Raise `ConfigError` for an engine whose state lies where it is not looked for, or is not equal over ranks."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    if not isinstance(engine, DeepSpeedEngine):
        raise ConfigError(f"attach needs the engine that deepspeed.initialize returns, but got a {type(engine).__name__}")
    zero = engine._config.zero_config
    offloads = (zero.offload_optimizer, zero.offload_param)
    problems = {
        "pipeline parallelism": bool(engine.pipeline_parallelism),
        "tensor parallelism (autotp, or an mpu)": engine.mp_world_size > 1 or engine.autotp_size() > 1,
        "expert parameters (MoE)": bool(engine.has_moe_layers),
        "offload to NVMe": any(offload is not None and offload.device == "nvme" for offload in offloads),
        "offload of a part of the optimizer (ratio below 1)": offloads[0] is not None and offloads[0].ratio < 1.0,
        "MiCS": getattr(zero, "mics_shard_size", 0) > 0,
        "hpZ (zero_hpz_partition_size)": zero.zero_hpz_partition_size > 1,
        "zero_quantized_nontrainable_weights": bool(zero.zero_quantized_nontrainable_weights),
        "ZenFlow": bool(engine.zenflow),
        "SuperOffload": bool(engine.super_offload()),
    }
    found = [name for name, is_used in problems.items() if is_used]
    if found:
        raise ConfigError(
            f"{', '.join(found)}: not supported by shardckpt.integrations.deepspeed. Train without, or do not attach: "
            "DeepSpeed's own save_checkpoint saves this engine"
        )
    kind = type(engine.optimizer)
    if kind.__module__.startswith("deepspeed.runtime") and kind.__name__ not in KNOWN | {"DummyOptim"}:
        raise ConfigError(
            f"{kind.__module__}.{kind.__name__}: shardckpt.integrations.deepspeed does not know where it keeps its state; "
            f"it knows {', '.join(sorted(KNOWN))}"
        )


def require_between_steps(engine: Any, what: str) -> None:
    """Raise `StateError` when gradients wait for further micro batches, or when parts of the state are offloaded."""
    if engine.managed_gradient_accumulation():
        window = engine.gradient_accumulation_steps()
        forced = engine._is_gradient_accumulation_boundary
        at = engine.micro_steps % window
        is_within = at != 0 if forced is None else not forced and engine.micro_steps > 0
    else:
        window, at = None, engine._unmanaged_backward_count
        is_within = at != 0
    if is_within:
        raise StateError(
            f"{what} after micro step {at}{f' of {window}' if window else ''} of a gradient accumulation: the gradients "
            "gathered so far are not part of a checkpoint. Call it when engine.step() has updated the weights, at micro step 0",
            micro_step=at,
            window=window,
        )
    offloaded = sorted(state.value for state in getattr(engine.optimizer, "offloaded_states", ()))
    if offloaded:
        raise StateError(
            f"{what} while {', '.join(offloaded)} are offloaded: call engine.reload_states() first", offloaded=offloaded
        )
