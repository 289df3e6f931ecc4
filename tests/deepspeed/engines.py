# SPDX-License-Identifier: Apache-2.0
"""What the tests with real DeepSpeed share: a small model, its batches, engines of all stages, and a look into them.

In a test::

    pytestmark = needs_deepspeed                       # skips with a printed reason where DeepSpeed is not installed

    def losses(stage):                                 # on the ranks
        engine = make_engine(stage, "bf16")
        return train(engine, first=1, count=3)

    def test_losses(ranks):
        assert ranks.run(4, losses, 2)[0] == ranks.run(4, losses, 1)[0]

`masters` and `moments` read an engine by arithmetic of their own, so that they may judge what shardckpt reads and writes.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed; ./launch/test.sh installs it, and prints the reason where it cannot",
)

GLOBAL_BATCH = 12
"""Rows of each batch: every world size of the tests divides it."""
VOCABULARY, WIDTH, HIDDEN = 13, 7, 11
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MATRIX_DECAY = 0.1
"""Weight decay of the first param group; the second, of vectors, has none."""
_OPEN = "SHARDCKPT_TESTS_DEEPSPEED_OPEN"


class SmallModel(nn.Module):
    """Odd sizes, so that every stage cuts inside parameters and pads; a tied weight, a buffer and frozen parameters."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.linspace(0.5, 1.5, WIDTH))
        self.frozen.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x * self.scale.to(x.dtype)
        x = x + self.down(F.gelu(self.up(x + self.frozen(x))))
        return self.head(self.norm(x))


def small_model(seed: int = 0) -> SmallModel:
    """A model whose weights follow from ``seed`` alone."""
    torch.manual_seed(seed)
    return SmallModel()


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Trainable matrices, with weight decay, and trainable vectors, without."""
    trainable = [param for param in model.parameters() if param.requires_grad]
    return [
        {"params": [param for param in trainable if param.ndim >= 2], "weight_decay": MATRIX_DECAY},
        {"params": [param for param in trainable if param.ndim < 2], "weight_decay": 0.0},
    ]


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer that most tests train with."""
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))


def config(stage: int, dtype: str = "bf16", *, accumulate: int = 1, **zero: Any) -> dict[str, Any]:
    """DeepSpeed's configuration; ``zero`` goes into ``zero_optimization``."""
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // dist.get_world_size(),
        "gradient_accumulation_steps": accumulate,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **zero},
    }
    if stage == 3:
        # vectors stay gathered between steps, matrices do not; and torch.nn.functional.linear keeps what it is for all tests
        made["zero_optimization"] |= {"stage3_param_persistence_threshold": 20, "memory_efficient_linear": False, **zero}
    if dtype == "bf16":
        made["bf16"] = {"enabled": True}
    if dtype == "fp16":
        made["fp16"] = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2}
    return made


def make_engine(
    stage: int,
    dtype: str = "bf16",
    *,
    seed: int = 0,
    model: nn.Module | None = None,
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = adamw,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    accumulate: int = 1,
    **zero: Any,
) -> Any:
    """A DeepSpeed engine in a rank process of `tests.ranks`; collective. Case after case may make as many as it likes."""
    deepspeed = open_deepspeed()
    model = small_model(seed) if model is None else model
    settings = config(stage, dtype, accumulate=accumulate, **zero)
    made = optimizer(param_groups(model))
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=made, lr_scheduler=scheduler, config=settings)
    return engine


def open_deepspeed() -> Any:
    """The module deepspeed, on top of the process group of the running case."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    is_first = "deepspeed" not in sys.modules
    import deepspeed
    import deepspeed.comm.comm
    import deepspeed.ops
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups, logger

    if is_first:
        # it has garbage collected often, and what is loaded need not be looked at each time
        gc.freeze()
    # float16 is slow on most CPUs, not wrong; DeepSpeed takes it only where there are instructions for it
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    # it would compile an op for two minutes; gloo has the same collective
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel(logging.ERROR)
    # The harness gives every case the environment that it found, so a case of before has left no such mark.
    if _OPEN not in os.environ:
        os.environ[_OPEN] = "1"
        deepspeed.comm.comm.cdb = None
        groups._release_process_group_references()
        # ranks have taken part in different cases, and stage 3 compares the numbers of modules and parameters between them
        Init.param_id = 0
        DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__ = ([0],)
        gc.collect()
    deepspeed.init_distributed("gloo", verbose=False)
    return deepspeed


def batch(index: int) -> tuple[Tensor, Tensor]:
    """This rank's rows of global batch ``index``: tokens and the tokens to predict, each of shape (rows, 5)."""
    rows = torch.randint(VOCABULARY, (GLOBAL_BATCH, 6), generator=torch.Generator().manual_seed(index))
    mine = rows.chunk(dist.get_world_size())[dist.get_rank()]
    return mine[:, :-1], mine[:, 1:]


def train(engine: Any, *, first: int, count: int) -> list[float]:
    """Train on the batches ``first``, ``first + 1``, ...; the mean loss over all ranks of each."""
    losses = []
    for index in range(first, first + count):
        tokens, wanted = batch(index)
        loss = F.cross_entropy(engine(tokens).float().flatten(0, 1), wanted.flatten())
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses


def masters(engine: Any) -> dict[str, Tensor]:
    """Full master weights of the trainable parameters, on all ranks; collective."""
    return {name: whole(param, part) for name, param, part, _ in _parts(engine)}


def moments(engine: Any) -> dict[str, dict[str, Any]]:
    """Full optimizer state of each trainable parameter, on all ranks; collective. Scalars, ``step`` say, are numbers."""
    found: dict[str, dict[str, Any]] = {}
    for name, param, part, states in _parts(engine):
        found[name] = {
            key: whole(param, value) if torch.is_tensor(value) and value.shape == part.shape else float(value)
            for key, value in states.items()
        }
    return found


def computed_with(engine: Any) -> dict[str, Tensor]:
    """All parameters, frozen ones too, in full and in the dtype that the model computes with; collective."""
    from deepspeed.runtime.zero import GatheredParameters

    params = dict(engine.module.named_parameters())
    with GatheredParameters(list(params.values())):
        return {name: param.detach().clone() for name, param in params.items()}


def group_values(engine: Any, key: str) -> list[Any]:
    """One option, ``weight_decay`` say, of each param group that the optimizer steps with."""
    return [group[key] for group in torch_optimizer(engine).param_groups]


def torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer under DeepSpeed's wrappers."""
    inner: torch.optim.Optimizer = engine.basic_optimizer
    return inner


def start_from(engine: Any, weights: dict[str, Tensor], states: dict[str, dict[str, Any]]) -> None:
    """Write full masters and moments, as `masters` and `moments` gave them, into an engine, past all checkpoints; collective.

    The parameters that are computed with follow. For references: an uninterrupted run that starts from a known state.
    """
    with torch.no_grad():
        for name, param, part, mine in _parts(engine):
            part.copy_(cut_like(param, weights[name], part))
            for key, value in states[name].items():
                if torch.is_tensor(value):
                    mine[key].copy_(cut_like(param, value, part))
                else:
                    mine[key].fill_(value)
        _round_masters(engine)


def _round_masters(engine: Any) -> None:
    """Make the parameters that are computed with the rounded masters."""
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 3:
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer.fp16_partitioned_groups_flat[group].data.copy_(optimizer.fp32_partitioned_groups_flat[group].data)
            optimizer._unflatten_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif hasattr(optimizer, "fp32_groups"):
        for lows, highs in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for low, high in zip(lows, highs, strict=True):
                low.data.copy_(high.data)
    elif stage > 0:
        for mine, full in zip(
            optimizer.single_partition_of_fp32_groups, optimizer.parallel_partitioned_bit16_groups, strict=True
        ):
            full[dist.get_rank()].copy_(mine)
            dist.all_gather(full, full[dist.get_rank()].clone())


def whole(param: Tensor, part: Tensor) -> Tensor:
    """One parameter-shaped tensor in full, from the part that this rank has of it; collective."""
    shape = getattr(param, "ds_shape", param.shape)
    if not hasattr(param, "_hp_mapping") and not hasattr(param, "ds_id"):
        return part.detach().clone().view(shape)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part.detach().clone())
    return torch.cat(parts)[: shape.numel()].view(shape)


def cut_like(param: Tensor, full: Tensor, part: Tensor) -> Tensor:
    """What this rank has of a parameter-shaped tensor, in the shape of ``part``."""
    if hasattr(param, "ds_id"):
        padded = F.pad(full.flatten(), (0, part.numel() * dist.get_world_size() - full.numel()))
        return padded.narrow(0, part.numel() * dist.get_rank(), part.numel())
    mapping = getattr(param, "_hp_mapping", None)
    if mapping is not None:
        return full.flatten().narrow(0, mapping.lp_fragment_address.start, part.numel())
    return full.flatten()[: part.numel()].view(part.shape)


def _parts(engine: Any) -> Iterator[tuple[str, Tensor, Tensor, dict[str, Any]]]:
    """(name, parameter, this rank's part of its master, the same part of each of its states)."""
    stage = engine.zero_optimization_stage()
    for name, param in engine.module.named_parameters():
        if not param.requires_grad:
            continue
        if stage == 3:
            part, states = _stage3_part(engine.optimizer, param)
        elif stage > 0:
            part, states = _stage12_part(engine.optimizer, param)
        else:
            part, states = _stage0_part(engine, param)
        yield name, param, part, states


def _stage12_part(optimizer: Any, param: Any) -> tuple[Tensor, dict[str, Any]]:
    mapping = param._hp_mapping
    if mapping is None:
        group = next(at for at, params in enumerate(optimizer.bit16_groups) if any(param is each for each in params))
        at, numel = 0, 0
    else:
        group, (at, numel) = mapping.param_group_index, (mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel)
    flat = optimizer.single_partition_of_fp32_groups[group]
    return flat.data.narrow(0, at, numel), _narrowed(optimizer.optimizer.state.get(flat, {}), flat, at, numel)


def _stage3_part(optimizer: Any, param: Any) -> tuple[Tensor, dict[str, Any]]:
    group, at, numel = optimizer.grad_position[optimizer.get_param_id(param)]
    flat = optimizer.fp32_partitioned_groups_flat[group]
    return flat.data.narrow(0, at, numel), _narrowed(optimizer.optimizer.state.get(flat, {}), flat, at, numel)


def _stage0_part(engine: Any, param: Tensor) -> tuple[Tensor, dict[str, Any]]:
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # BF16_Optimizer: flat, and cut over the ranks
        mapping: Any = param._hp_mapping  # type: ignore[attr-defined]
        group = next(at for at, params in enumerate(optimizer.bf16_groups) if any(param is each for each in params))
        at, numel = (mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel) if mapping else (0, 0)
        flat = optimizer.fp32_groups_flat_partition[group]
        return flat.data.narrow(0, at, numel), _narrowed(optimizer.optimizer.state.get(flat, {}), flat, at, numel)
    if hasattr(optimizer, "fp32_groups"):  # FP16_UnfusedOptimizer: a master for each parameter
        for lows, highs in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for low, high in zip(lows, highs, strict=True):
                if low is param:
                    return high.data, optimizer.optimizer.state.get(high, {})
    return param.data, torch_optimizer(engine).state.get(param, {})


def _narrowed(states: dict[str, Any], flat: Tensor, at: int, numel: int) -> dict[str, Any]:
    return {
        key: value.narrow(0, at, numel) if torch.is_tensor(value) and value.shape == flat.shape else value
        for key, value in states.items()
    }
