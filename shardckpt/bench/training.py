# SPDX-License-Identifier: Apache-2.0
"""A training run that can go on as long as somebody wants to see what disturbs it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .content import poison
from .model import CLASSES, build_model, state_tensors
from .shapes import GPTShape


class Training:
    """A GPT under FSDP2 on this rank, with AdamW, trained on tokens that mean nothing."""

    def __init__(self, shape: GPTShape, samples: int, device: str = "cpu") -> None:
        """``samples`` rows of tokens per rank and step, on ``device`` (``cpu`` or ``cuda``)."""
        self._shape = shape
        self._samples = samples
        self._device = torch.device(device)
        if device == "cuda":
            self._device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self._device)
        self.model = build_model(shape, device=device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self._random = torch.Generator().manual_seed(dist.get_rank())
        self.restart()

    @property
    def state(self) -> dict[str, Any]:
        """What is saved."""
        return {"model": self.model, "optimizer": self.optimizer}

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's part of the state."""
        return sum(local.nbytes for local in self._locals().values())

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self._device

    def restart(self) -> None:
        """Take new parameters, and one step, after which the optimizer has all of its state."""
        self.optimizer.state.clear()
        for name, local in self._locals().items():
            if name.endswith("bias"):
                local.zero_()
            elif "norm" in name:
                local.fill_(1.0)
            else:
                local.normal_(std=0.02)
        self.step()

    def step(self, before_update: Callable[[], None] = lambda: None) -> None:
        """Forward, backward, ``before_update``, and the optimizer's step; returns when the device has done all of it."""
        tokens = torch.randint(
            min(CLASSES, self._shape.vocabulary), (self._samples, self._shape.context + 1), generator=self._random
        ).to(self._device)
        logits = self.model(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        before_update()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.settle()

    def settle(self) -> None:
        """Wait for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def digests(self) -> dict[str, int]:
        """A 128-bit digest of this rank's part of each tensor: as good as a copy to compare with, and small."""
        return {name: _digest(local) for name, local in self._locals().items()}

    def poison(self) -> None:
        """Overwrite everything, so that what is right afterwards was loaded."""
        for local in self._locals().values():
            poison(local)

    def _locals(self) -> dict[str, Tensor]:
        named = state_tensors(self.model, self.optimizer)
        return {name: (t.to_local() if isinstance(t, DTensor) else t).detach() for name, t in named}


def _digest(local: Tensor) -> int:
    flat = local.cpu().contiguous().reshape(-1)
    return xxhash.xxh3_128_intdigest(flat.view(torch.uint8).numpy().data)
