# SPDX-License-Identifier: Apache-2.0
"""Training loops in which everything that can change does, for tests of what is saved while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import shardckpt
from tests.engine.guarding import BATCH, Net


@dataclass
class Loop:
    """A state, and one iteration of the loop that changes all of it in place."""

    state: dict[str, Any]
    train: Callable[[], Any]


class Trainer:
    """Two passes with noise, one step, and then all that people do after it."""

    def __init__(self, net: nn.Module, make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW, **options: Any) -> None:
        self.net = net
        self.optimizer = make((param for param in net.parameters() if param.requires_grad), **options)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        self.progress: dict[str, Any] = {"losses": [], "sum": torch.zeros(2), "rank": shardckpt.PerRank(torch.zeros(3))}

    def state(self) -> dict[str, Any]:
        return {
            "model": self.net,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "ema": self.ema,
            "progress": self.progress,
            "rng": shardckpt.RNGState(),
        }

    def loss(self) -> torch.Tensor:
        loss: torch.Tensor = self.net(BATCH + torch.randn_like(BATCH)).square().mean()
        return loss

    def backward(self) -> None:
        for _ in range(2):
            loss = self.loss()
            loss.backward()
            self.progress["losses"].append(loss.item())
            self.progress["sum"] += loss.item()
            self.progress["rank"].value.add_(1)

    def step(self) -> None:
        self.optimizer.step()

    def after(self) -> None:
        self.ema.update_parameters(self.net)
        self.scheduler.step()
        self.optimizer.zero_grad()

    def train(self) -> None:
        self.backward()
        # an average is taken at any time, not only after a step
        self.ema.update_parameters(self.net)
        self.step()
        self.after()


def plain(**options: Any) -> Callable[[], Loop]:
    def make() -> Loop:
        trainer = Trainer(Net(), **options)
        return Loop(trainer.state(), trainer.train)

    return make


def large() -> Loop:
    """More than a chunk of everything."""
    trainer = Trainer(nn.Sequential(Net(), nn.Linear(4, 120_000)))
    return Loop(trainer.state(), trainer.train)


def two_optimizers() -> Loop:
    trainers = {"generator": Trainer(Net()), "critic": Trainer(Net(), torch.optim.SGD, lr=0.1, momentum=0.9)}

    def train() -> None:
        for trainer in trainers.values():
            trainer.train()

    return Loop({name: trainer.state() for name, trainer in trainers.items()}, train)


def compiled_step() -> Loop:
    torch._dynamo.reset()
    trainer = Trainer(Net())
    trainer.step = torch.compile(trainer.optimizer.step, backend="aot_eager")  # type: ignore[method-assign]
    return Loop(trainer.state(), trainer.train)


def compiled_whole() -> Loop:
    torch._dynamo.reset()
    trainer = Trainer(Net())

    @torch.compile(backend="aot_eager")
    def train() -> None:
        trainer.loss().backward()
        trainer.optimizer.step()

    def everything() -> None:
        trainer.backward()
        train()
        trainer.after()

    return Loop(trainer.state(), everything)


def scaler() -> Loop:
    trainer = Trainer(Net())
    scale = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)

    def train() -> None:
        for _ in range(2):
            scale.scale(trainer.loss()).backward()
        scale.unscale_(trainer.optimizer)
        nn.utils.clip_grad_norm_(trainer.net.parameters(), 0.1)
        scale.step(trainer.optimizer)
        scale.update()
        trainer.progress["sum"] += 1
        trainer.after()

    return Loop({**trainer.state(), "scaler": scale}, train)


def closure() -> Loop:
    trainer = Trainer(Net(), torch.optim.LBFGS, lr=0.1, max_iter=3)

    def again() -> float:
        trainer.optimizer.zero_grad()
        loss = trainer.loss()
        loss.backward()
        trainer.progress["sum"] += loss.item()
        return loss.item()

    def train() -> None:
        trainer.optimizer.step(again)
        trainer.ema.update_parameters(trainer.net)
        trainer.scheduler.step()

    return Loop(trainer.state(), train)


def in_backward() -> Loop:
    net = Net()
    named = {name: param for name, param in net.named_parameters() if param.requires_grad}
    optimizers = {name: torch.optim.AdamW([param]) for name, param in named.items()}
    for name, param in named.items():
        param.register_post_accumulate_grad_hook(_stepper(optimizers[name]))
    ema = AveragedModel(net)

    def train() -> None:
        net(BATCH).square().mean().backward()
        ema.update_parameters(net)

    return Loop({"model": net, "optimizers": optimizers, "ema": ema}, train)


def _stepper(optimizer: torch.optim.Optimizer) -> Callable[[torch.Tensor], None]:
    def step(param: torch.Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    return step


def without_optimizer() -> Loop:
    """Whoever updates weights by hand gets them copied at once."""
    net = Net()

    @torch.no_grad()
    def train() -> None:
        net(BATCH)
        for param in net.parameters():
            param.mul_(0.9)

    return Loop({"model": net}, train)


def tensors_only() -> Loop:
    tensors = [torch.zeros(5), torch.zeros(2, 3).t(), torch.zeros((), dtype=torch.int64)]

    def train() -> None:
        for tensor in tensors:
            tensor += 1

    return Loop({"a": tensors[0], "b": [tensors[1], {"c": tensors[2]}]}, train)


LOOPS: dict[str, Callable[[], Loop]] = {
    "one by one": plain(foreach=False),
    "foreach": plain(foreach=True, amsgrad=True),
    "fused": plain(fused=True),
    "tensor lr": plain(lr=torch.tensor(0.01), foreach=False),
    "large": large,
    "two optimizers": two_optimizers,
    "compiled step": compiled_step,
    "compiled whole": compiled_whole,
    "scaler": scaler,
    "closure": closure,
    "in backward": in_backward,
    "without optimizer": without_optimizer,
    "tensors only": tensors_only,
}


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a loaded state by name."""
    if isinstance(value, shardckpt.PerRank):
        value = value.value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, f"{name}/{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for at, item in enumerate(value):
            yield from flatten(item, f"{name}/{at}")
    else:
        yield name, value
