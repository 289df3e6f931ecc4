# SPDX-License-Identifier: Apache-2.0
"""What is saved and loaded beside DeepSpeed: a GPT under one of its ZeRO stages, in bf16 with AdamW, on this rank.

Nothing is trained: masters and moments are filled with content that can be checked (see `content`), bit by bit and at any
world size. That both engines give it back says that they agree on what lies where.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from ..errors import ConfigError
from ..integrations.deepspeed.masters import masters_of
from ..layout import FlatLayout
from .content import count_wrong, fill, poison
from .model import GPT
from .shapes import GPTShape


def require_deepspeed(find: Callable[[str], object] = importlib.util.find_spec) -> str:
    """The version of DeepSpeed that is installed; raises `ConfigError` with the remedy when ``find`` finds none."""
    if find("deepspeed") is None:
        raise ConfigError(
            "DeepSpeed is not installed, and this benchmark measures it too. Its setup imports torch, so: "
            "pip install setuptools wheel ninja py-cpuinfo && "
            "DS_BUILD_OPS=0 pip install --no-build-isolation 'shardckpt[deepspeed]'"
        )
    return importlib.metadata.version("deepspeed")


class EngineWorkload:
    """An engine of DeepSpeed; collective. Its checkpoint methods are its own."""

    def __init__(self, stage: int, nbytes: int, *, universal: bool = False) -> None:
        """``nbytes`` of masters and moments on all ranks together; with ``universal`` it loads universal checkpoints."""
        deepspeed = _open_deepspeed()
        model = GPT(GPTShape.of_size(nbytes))
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": stage},
            "checkpoint": {"load_universal": universal},
        }
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self.engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        self.engine.global_steps = 1
        self._make_moments()
        for name, part, whole, start in self._parts():
            fill(name, part, (whole,), (start,))

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's part of masters and moments, without padding."""
        return sum(part.nbytes for _, part, _, _ in self._parts())

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(getattr(param, "ds_numel", param.numel()) for param in self.engine.module.parameters())

    def poison(self) -> None:
        """Overwrite everything, so that what is right afterwards was loaded."""
        for _, part, _, _ in self._parts():
            poison(part)

    def find_wrong(self) -> list[str]:
        """Names of the tensors that do not have their content, each with how many elements are wrong."""
        counts = {name: count_wrong(name, part, (whole,), (start,)) for name, part, whole, start in self._parts()}
        return [f"{name} ({count} elements)" for name, count in counts.items() if count]

    def _make_moments(self) -> None:
        """Give the optimizer the state that it would have after one step."""
        masters = masters_of(self.engine)
        assert masters.optimizer is not None
        for master in masters.masters():
            masters.optimizer.state[master.tensor] = {
                "step": torch.ones(()),
                "exp_avg": torch.zeros_like(master.tensor),
                "exp_avg_sq": torch.zeros_like(master.tensor),
            }

    def _parts(self) -> Iterator[tuple[str, torch.Tensor, int, int]]:
        """(name, this rank's part, elements of the whole, first element) of each master and moment, flat."""
        masters = masters_of(self.engine)
        for master in masters.masters():
            assert masters.optimizer is not None
            moments = masters.optimizer.state[master.tensor]
            flats = {"": master.tensor, **{key: value for key, value in moments.items() if value.shape == master.tensor.shape}}
            for slot in master.slots:
                if not slot.numel:
                    continue
                assert isinstance(slot.layout, FlatLayout), slot
                start = _first_element(slot.layout)
                for key, flat in flats.items():
                    part = flat.detach().narrow(0, slot.offset, slot.numel)
                    yield f"{slot.fqn}/{key}", part, torch.Size(slot.layout.shape).numel(), start


def _first_element(layout: FlatLayout) -> int:
    """Where this rank's part begins in a parameter."""
    return next(start for rank, start, _ in layout.ranges if rank == dist.get_rank())


def _open_deepspeed() -> Any:
    """DeepSpeed on CPU, on top of the process group that there is."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops

    # compiling it takes minutes, and gloo has the same collective
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # of each collective that it calls by a name of before
    warnings.simplefilter("ignore", FutureWarning)
    deepspeed.init_distributed("gloo", verbose=False)
    return deepspeed
