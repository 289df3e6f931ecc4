# SPDX-License-Identifier: Apache-2.0
"""A small training job that loses a rank in its first start, and ends with a status of its own; all it is given is a folder.

Each rank writes down what it consumes: number of the start, step, loss, samples.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import shardckpt

SAMPLES, BATCH, SAVE_EVERY = 60, 12, 2
FATAL_STEP, STATUS = 5, 7
DEADLINE = 200.0


def train(folder: Path, last: int) -> None:
    """From the newest checkpoint to step ``last``; the root comes from the environment."""
    rank, start = dist.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    torch.manual_seed(0)
    model = nn.Linear(8, 1, dtype=torch.float64)
    inputs = torch.randn(SAMPLES, 8, dtype=torch.float64)
    # not an optimizer of torch, whose import of a compiler takes as long as all else
    velocity = torch.zeros(9, dtype=torch.float64)
    sampler = shardckpt.ElasticSampler(SAMPLES, BATCH, seed=1)
    state = {"model": model, "velocity": velocity, "sampler": sampler}
    with shardckpt.Checkpointer() as ckpt, (folder / f"log-{os.getpid()}").open("w", buffering=1) as log:
        restored = ckpt.restore(state)
        first = restored.step + 1 if restored else 1
        for step, batch in zip(range(first, last + 1), sampler.track(sampler, repeat=True), strict=False):
            model.zero_grad()
            loss = (model(inputs[batch]) - 1).square().sum() / BATCH
            loss.backward()
            mine = [parameter.grad for parameter in model.parameters()]
            total = torch.cat([loss.detach().reshape(1), *(grad.flatten() for grad in mine if grad is not None)])
            dist.all_reduce(total)
            velocity.mul_(0.9).sub_(total[1:], alpha=0.02)
            with torch.no_grad():
                model.weight.add_(velocity[:8])
                model.bias.add_(velocity[8:])
            log.write(json.dumps([start, step, total[0].item(), batch]) + "\n")
            if step == FATAL_STEP and not restored and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if step % SAVE_EVERY == 0:
                ckpt.save(step, state, wait=True)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    train(Path(sys.argv[1]), int(sys.argv[2]))
    dist.destroy_process_group()
    sys.exit(int(sys.argv[3]))
