# SPDX-License-Identifier: Apache-2.0
"""Train a tiny model on nodes that come and go: a plain torchrun script that writes down what each rank consumes.

    shardckpt run --root /shared/job/run --nnodes 1:4 --rdzv-id job ... -- launch/elastic_train.py /shared/job

All nodes share that directory. Training goes on until there is a file ``stop`` in it, or until ``--steps``. On SIGTERM all
ranks save the step that they are in, and leave. `launch.elastic_proof` reads what they have written down.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import shardckpt

SAMPLES, BATCH, SAVE_EVERY = 120, 12, 10
FEATURES = 8
COLLECTIVE_SECONDS = 30.0


def dataset() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets; the same in each process."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(SAMPLES, FEATURES + 1, generator=generator, dtype=torch.float64)
    return noise[:, :FEATURES], noise[:, FEATURES:]


class Momentum:
    """Gradient descent that goes on in the direction of the steps before.

    Those of torch.optim import torch's compiler, which takes as long as all else when a process starts; here many do.
    """

    def __init__(self, model: nn.Module, rate: float = 0.02, friction: float = 0.1) -> None:
        self._model = model
        self._rate, self._friction = rate, friction
        self.velocities = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
        """What has to be restored with the weights."""

    @torch.no_grad()
    def step(self) -> None:
        """Change the weights as their gradients say."""
        for name, parameter in self._model.named_parameters():
            assert parameter.grad is not None
            velocity = self.velocities[name].mul_(1 - self._friction)
            parameter.add_(velocity.sub_(parameter.grad, alpha=self._rate))


def build() -> tuple[nn.Module, Momentum]:
    """A model, and what trains it. In float64: other numbers of ranks add in another order, which shall not show."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    return model, Momentum(model)


def gradients(model: nn.Module, batch: list[int]) -> torch.Tensor:
    """Leave the gradients of this rank's part of a batch, as a part of those of the whole; returns its part of the loss."""
    inputs, targets = dataset()
    model.zero_grad()
    loss = (model(inputs[batch]) - targets[batch]).square().sum() / BATCH
    loss.backward()
    return loss.detach()


def train_step(model: nn.Module, optimizer: Momentum, batch: list[int], order: float) -> tuple[float, float]:
    """One step of all ranks together: the loss of the whole batch, and the sum of what the ranks give as ``order``."""
    loss = gradients(model, batch)
    parameters = list(model.parameters())
    parts = [parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]
    total = torch.cat([*parts, loss.view(1), torch.tensor([order], dtype=loss.dtype)])
    dist.all_reduce(total)
    for parameter, part in zip(parameters, total[:-2].split([parameter.numel() for parameter in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).clone()
    optimizer.step()
    return total[-2].item(), total[-1].item()


class Log:
    """What this rank of this start of the job does, line by line, in files that no other rank writes."""

    def __init__(self, directory: Path, first: int) -> None:
        """``first`` is the step that it begins with. Collective."""
        number = [len(list(directory.glob("start-*")))]
        dist.broadcast_object_list(number, 0)
        if dist.get_rank() == 0:
            new = directory / "new"
            new.write_text(json.dumps({"ranks": dist.get_world_size(), "first": first}))
            new.rename(directory / f"start-{number[0]}")
        # by lines, so that nothing is lost with a process that is killed
        self._file = (directory / f"steps-{number[0]}-{dist.get_rank()}").open("w", buffering=1)

    def did(self, step: int, loss: float, samples: list[int]) -> None:
        """A training step is done."""
        self._file.write(json.dumps({"step": step, "loss": loss, "samples": samples}) + "\n")

    def saved(self, step: int) -> None:
        """This rank was told that the step is durable."""
        self._file.write(json.dumps({"saved": step}) + "\n")


def train(directory: Path, steps: int | None, pause: float) -> None:
    """From the newest checkpoint in the root that ``shardckpt run`` was given, on as many ranks as there are."""
    model, optimizer = build()
    sampler = shardckpt.ElasticSampler(SAMPLES, BATCH, seed=1)
    state = {"model": model, "velocities": optimizer.velocities, "sampler": sampler}
    with shardckpt.Checkpointer(keep_last=3, every_steps=SAVE_EVERY) as ckpt:
        ckpt.on_signal(signal.SIGTERM)
        restored = ckpt.restore(state)
        first = restored.step + 1 if restored else 1
        log = Log(directory, first)
        handle = None
        for step, batch in enumerate(sampler.track(sampler, repeat=True), first):
            # it goes with what is summed anyway, so that all ranks stop at one step
            is_last = step == steps or (dist.get_rank() == 0 and (directory / "stop").exists())
            loss, stop = train_step(model, optimizer, batch, float(is_last))
            log.did(step, loss, batch)
            if handle and handle.done():
                if handle.error is None:
                    log.saved(handle.step)
                handle = None
            if ckpt.should_save(step) or stop:
                try:
                    handle = ckpt.save(step, state, wait=bool(stop))
                except SystemExit:
                    # after a signal, it leaves when the checkpoint is durable
                    log.saved(step)
                    raise
            if stop:
                log.saved(step)
                return
            # a step of a real job takes longer
            time.sleep(pause)


def main() -> None:
    """Read the options, join the other ranks, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where to write down what is consumed")
    parser.add_argument("--steps", type=int, help="steps in all (default: until there is a file named stop)")
    parser.add_argument("--pause", type=float, default=0.03, help="seconds added to each step (default: %(default)s)")
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=COLLECTIVE_SECONDS))
    train(args.directory, args.steps, args.pause)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
