# SPDX-License-Identifier: Apache-2.0
"""The training of `restart`, in which a rank kills itself: ``-m shardckpt.bench.restart_job FOLDER BYTES [ROOT]``.

In the first start rank 1 dies (rank 0, if it is alone) when a step is saved and another one done; the second start ends after
one step. With ROOT the state is saved there, and restored. Each rank adds lines to a file of its own in FOLDER.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

import shardckpt

from .restart_marks import SAVED, Mark
from .shapes import GPTShape
from .training import Training


def main(folder: str, nbytes: int, root: str | None) -> None:
    """Train, and write down when what is done."""
    torch.set_num_threads(1)
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.init_process_group("gloo")
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    with Path(folder, f"rank-{rank}").open("ab", buffering=0) as log:

        def mark(what: str, step: int) -> None:
            log.write(msgspec.json.encode(Mark(start, what, step, time.time())) + b"\n")

        mark("joined", 0)
        training = Training(GPTShape.of_size(nbytes), samples=1)
        checkpointer = None if root is None else shardckpt.Checkpointer(root)
        first = 1
        if checkpointer is not None:
            restored = checkpointer.restore(training.state)
            first = restored.step + 1 if restored else 1
            mark("restored", first - 1)
        for step in (first, first + 1):
            training.step()
            mark("step", step)
            if start > 0:
                break
            if checkpointer is not None and step == SAVED:
                checkpointer.save(step, training.state, wait=True)
        if start == 0 and rank == min(1, last):
            mark("kill", step)
            os.kill(os.getpid(), signal.SIGKILL)
    # torchrun ends the others of the first start when it sees that one is gone
    dist.barrier()
    if checkpointer is not None:
        checkpointer.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
