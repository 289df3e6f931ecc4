# SPDX-License-Identifier: Apache-2.0
"""A small training job for torchrun on several hosts, which loses some of them; it goes on until it is told to stop.

It trains what the elastic demo trains, and writes down the same in a directory that all share. Saves can be stopped in a phase,
as ``ambush`` there says.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import shardckpt
from launch.elastic_train import BATCH, SAMPLES, Log, build, train_step
from shardckpt.errors import RankTimeout
from tests.engine.stores import checkpointer
from tests.nodes.cluster import come_to
from tests.nodes.gates import Gated

SAVE_EVERY = 5
TIMEOUT = 8.0
"""Seconds that a save waits for other ranks; in an ambush all of them are at their gates before one is killed."""
LONG = 300.0
_GO_ON, _STOP, _AMBUSH = 0.0, 1.0, 2.0
_PAUSE = 0.02


class Start:
    """One start of the job, on one rank."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._model, self._optimizer = build()
        self._sampler = shardckpt.ElasticSampler(SAMPLES, BATCH, seed=1)
        self._state = {"model": self._model, "velocities": self._optimizer.velocities, "sampler": self._sampler}
        self._root = directory / "run"

    def train(self) -> None:
        """From the newest checkpoint on."""
        with shardckpt.Checkpointer(self._root, keep_last=3, options=shardckpt.Options(timeout=LONG)) as ckpt:
            restored = ckpt.restore(self._state)
            first = restored.step + 1 if restored else 1
            log = Log(self._directory, first)
            for step, batch in enumerate(self._sampler.track(self._sampler, repeat=True), first):
                # what rank 0 has found to do goes with what is summed anyway
                loss, order = train_step(self._model, self._optimizer, batch, self._order())
                log.did(step, loss, batch)
                if step % SAVE_EVERY == 0 or order != _GO_ON:
                    if order == _AMBUSH:
                        self._walk_into_ambush(step)
                    ckpt.save(step, self._state).result(LONG)
                    log.saved(step)
                if order == _STOP:
                    return
                # a step of a real job takes longer
                time.sleep(_PAUSE)

    def _order(self) -> float:
        if self._rank != 0:
            return _GO_ON
        if (self._directory / "stop").exists():
            return _STOP
        return _AMBUSH if self._size == 3 and (self._directory / "ambush").exists() else _GO_ON

    def _walk_into_ambush(self, step: int) -> None:
        """Save with gates in the way; who is left over says what he was told, and waits until he may leave."""
        told = json.loads((self._directory / "ambush").read_text())
        place, phase = self._directory / told["name"] / str(step), told["phase"]
        place.mkdir(parents=True, exist_ok=True)
        fs = Gated(str(self._root), phase, lambda: come_to(place, phase, self._rank))
        with checkpointer(self._root, fs, timeout=TIMEOUT) as ckpt:
            fs.armed = phase != "commit" or self._rank == 0
            try:
                ckpt.save(step, self._state, wait=True)
            except RankTimeout as error:
                (place / f"new-{self._rank}").write_text(json.dumps(error.ranks))
                (place / f"new-{self._rank}").rename(place / f"named-{self._rank}")
                come_to(place, "told", self._rank)
                # all at once, without a farewell, so that their agents meet again soon
                os._exit(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    Start(Path(sys.argv[1])).train()
    dist.destroy_process_group()
