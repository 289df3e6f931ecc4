# SPDX-License-Identifier: Apache-2.0
"""Background processes that outlive a killed job: the next start, on another number of ranks, goes on as if there were none."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest
import torch.distributed as dist

import shardckpt
from shardckpt import Options
from shardckpt.environment import RUN
from tests.engine.stores import a_state, files, loaded
from tests.engine.test_process_death import LONG, a_part, part_of, resume_all, stage_and_die
from tests.engine.usage import marked_processes
from tests.engine.waiting import until
from tests.ranks import RankDied, RankPool

PATIENCE = 120.0


def save_and_die(root: str, mark: str) -> None:
    """All ranks are killed when step 2 is staged; their background processes, which are stopped, have yet to write it."""
    os.environ[RUN] = "job"
    stage_and_die(root, mark, list(range(dist.get_world_size())))


def go_on(root: str, mark: str) -> list[list[int]]:
    """Resume; let what was left behind do the rest; save step 2 anew. The steps that are there before and after that."""
    os.environ[RUN] = "job"
    target = a_state(0)
    with shardckpt.Checkpointer(root, options=Options(timeout=LONG)) as ckpt:
        restored = ckpt.restore(target)
        assert restored is not None
        assert (restored.step, target["step"], restored.info.world_size) == (1, 1, 2)
        dist.barrier()
        if dist.get_rank() == 0:
            resume_all(mark)
            until(lambda: not marked_processes(mark), PATIENCE)
        dist.barrier()
        before = ckpt.steps()
        ckpt.save(2, a_part(-2)).result(PATIENCE)
        return [before, ckpt.steps()]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3])
def test_they_commit_nothing_when_the_next_start_has_chosen(ranks: RankPool, tmp_path: Path, size: int) -> None:
    mark, root = uuid.uuid4().hex, str(tmp_path)
    ended = ranks.run_expecting_errors(2, save_and_die, root, mark, timeout=250, fresh=True)
    assert [type(outcome) for outcome in ended] == [RankDied] * 2
    try:
        assert len(marked_processes(mark)) == 2
        assert ranks.run(size, go_on, root, mark, timeout=250, fresh=True) == [[[1], [1, 2]]] * size
    finally:
        for process in marked_processes(mark):
            process.kill()
    assert [part_of(loaded(root, 1), rank) for rank in (0, 1)] == [[10], [11]]
    assert [part_of(loaded(root, 2), rank) for rank in range(size)] == [[-20 + rank] for rank in range(size)]
    # no file of the save that was given up is left
    assert len([name for name in files(root) if name.startswith("step-00000002/rank-")]) == size
