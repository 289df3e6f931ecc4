# SPDX-License-Identifier: Apache-2.0
"""A small training job for torchrun: ranks of unequal speed, data from another process, saves when `should_save` says so."""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import shardckpt

SAMPLES = 100_000
DEADLINE = 100.0


def say(line: str) -> None:
    """Print in one piece, so that the lines of ranks do not mix."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def descend(model: nn.Module, batch: torch.Tensor) -> None:
    """One step of all ranks together. Not by an optimizer of torch: it imports a compiler, which takes as long as all else."""
    model.zero_grad()
    model(batch).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.sub_(parameter.grad, alpha=0.01)


def train(args: argparse.Namespace) -> None:
    """Say what happens: ``rank 1 begins at 1, pid 123``, ``rank 1 saves 7``, ``rank 1 step 7``."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))
    loader = DataLoader(TensorDataset(torch.randn(SAMPLES, 16)), num_workers=args.workers)
    state = {"model": model}
    with shardckpt.Checkpointer(args.root, every_seconds=args.every_seconds) as ckpt:
        ckpt.on_signal(signal.SIGTERM)
        restored = ckpt.restore(state)
        first = restored.step + 1 if restored else 1
        say(f"rank {rank} begins at {first}, pid {os.getpid()}")
        for step, (batch,) in zip(range(first, args.steps + 1), loader, strict=False):
            time.sleep(args.pause * (rank + 1))
            if step == args.hang_at and rank != 1:
                # as in a collective of which one rank is gone
                say(f"rank {rank} hangs")
                time.sleep(DEADLINE)
            descend(model, batch)
            if ckpt.should_save(step):
                say(f"rank {rank} saves {step}")
                ckpt.save(step, state)
            say(f"rank {rank} step {step}")


def main() -> None:
    """Join the other ranks and train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", required=True)
    parser.add_argument("--steps", type=int, default=SAMPLES)
    parser.add_argument("--pause", type=float, default=0.003)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--hang-at", type=int)
    parser.add_argument("--every-seconds", type=float)
    args = parser.parse_args()
    # A rank that hangs says where, and ends the job.
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        train(args)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
