# SPDX-License-Identifier: Apache-2.0
"""Two ranks save and prune, commands prune and are killed, and this process loads, lists and verifies, all on one root at once.

``SHARDCKPT_PRUNE_ROUNDS`` and ``SHARDCKPT_PRUNE_SEED`` make it longer, and another one.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt.errors import CheckpointNotFound, CheckpointRemoved
from shardckpt.maintain.listing import list_steps
from shardckpt.maintain.stored import open_checkpoint
from shardckpt.maintain.verify import verify
from shardckpt.manifest import rank_file_name, step_directory
from shardckpt.root import Root
from shardckpt.store import LocalStore
from tests.ranks import RankPool
from tests.store.helpers import names
from tests.style.source import ROOT

ROUNDS = int(os.environ.get("SHARDCKPT_PRUNE_ROUNDS", "6"))
SEED = int(os.environ.get("SHARDCKPT_PRUNE_SEED", "5"))


def a_state(step: int) -> dict[str, Any]:
    return {"t": torch.full((1000,), float(step)), "own": shardckpt.PerRank({"step": step}), "step": step}


def save_steps(root: str, first: int, rounds: int, seed: int) -> None:
    """On each rank: save steps, with gaps; there are dead attempts at some of them already."""
    generator = random.Random(seed)
    step = first
    with shardckpt.Checkpointer(root, keep_last=2) as ckpt:
        for _ in range(rounds):
            step += generator.choice((1, 1, 5))
            is_dead, blocking = generator.random() < 0.5, generator.random() < 0.5
            attempt = f"{generator.randrange(1 << 64):016x}"
            if is_dead and dist.get_rank() == 0:
                leave_dead_attempt(Path(root), step, attempt)
            ckpt.save(step, a_state(step), wait=blocking).result(60)


def leave_dead_attempt(root: Path, step: int, attempt: str) -> None:
    """Files of a save that was killed a week ago."""
    for rank in range(3):
        # made elsewhere, so that it is old when it appears
        made = root.parent / "made"
        made.write_bytes(b"x" * 100)
        then = made.stat().st_mtime - 7 * 86400
        os.utime(made, (then, then))
        put = LocalStore(root)
        # the directory may be removed as long as it is empty
        held = f"{step_directory(step)}/held-{rank}.tmp"
        put.put_if_absent(held, b"")
        made.rename(root / step_directory(step) / rank_file_name(rank, attempt))
        put.delete(held)


def start_prune(root: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "shardckpt", "prune", str(root), "--keep-last", "1"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def look_around(root: Path) -> None:
    """What everybody may count on, whatever the others are doing."""
    store = LocalStore(root)
    steps = Root(store).steps()
    target = a_state(0)
    with shardckpt.Checkpointer(root) as ckpt:
        try:
            restored = ckpt.restore(target)
            assert restored is not None
            assert restored.step >= steps[-1]
            assert (target["step"], target["t"].unique().tolist()) == (restored.step, [float(restored.step)])
        except CheckpointRemoved:
            # ten times in a row
            pass
        try:
            target = a_state(0)
            assert ckpt.restore(target, step=steps[0]) is not None
            assert (target["step"], target["t"].unique().tolist()) == (steps[0], [float(steps[0])])
        except CheckpointNotFound as error:
            assert isinstance(error, CheckpointRemoved) or steps[0] not in error.steps
    assert "damaged" not in {listed.state for listed in list_steps(store)}
    assert [problem for found in verify(store, read_data=True) for problem in found.problems] == []


@pytest.mark.slow
def test_saves_loads_and_prunes_at_once(ranks: RankPool, tmp_path: Path) -> None:
    print(f"SHARDCKPT_PRUNE_SEED={SEED} SHARDCKPT_PRUNE_ROUNDS={ROUNDS}")
    generator = random.Random(SEED)
    root = tmp_path / "run"
    with shardckpt.Checkpointer(root) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, a_state(step), wait=True)
    with ThreadPoolExecutor(1) as thread:
        saves: Future[list[Any]] = thread.submit(
            ranks.run, 2, save_steps, str(root), 3, ROUNDS, SEED, timeout=60.0 + 20 * ROUNDS
        )
        while not saves.done():
            prune = start_prune(root)
            try:
                if generator.random() < 0.5:
                    # at any time, as likely before its first change as after its last one
                    for _ in range(generator.randrange(4)):
                        look_around(root)
                    prune.kill()
                look_around(root)
            finally:
                output, _ = prune.communicate(timeout=120)
            assert prune.returncode in (0, -9), output.decode()
        saves.result()
    last = start_prune(root)
    output, _ = last.communicate(timeout=120)
    assert last.returncode == 0, output.decode()
    look_around(root)
    store = LocalStore(root)
    (step,) = Root(store).steps()
    manifest = open_checkpoint(store, f"{step_directory(step)}/").checkpoint.manifest
    assert manifest.world_size == 2
    left = [name for name in names(store) if not name.startswith((".saves/", ".clock/"))]
    assert left == sorted(f"{step_directory(step)}/{leaf}" for leaf in ("manifest.json", *(f.name for f in manifest.files)))
    assert Path(root / step_directory(step)).is_dir()
