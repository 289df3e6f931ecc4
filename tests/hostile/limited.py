# SPDX-License-Identifier: Apache-2.0
"""Look at hostile checkpoints with little memory and time: ``python -m tests.hostile.limited KIND PATH...``.

Prints a JSON object: by path, the error or null, seconds of CPU, and by how many bytes the peak of resident memory grew.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from shardckpt.errors import CheckpointError
from tests.hostile.base import examine, good

MEMORY = 768 << 20
"""Bytes of address space beyond those that the process has when it begins."""
CPU_SECONDS = 120


def limit() -> None:
    """Let the process have no more than a bit."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    room = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    seconds = int(time.process_time()) + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


def look(paths: list[str], act: Callable[[str], object]) -> dict[str, tuple[str | None, float, int]]:
    """What became of each path."""
    found: dict[str, tuple[str | None, float, int]] = {}
    for path in paths:
        before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        error = None
        try:
            act(path)
        except CheckpointError as refusal:
            error = type(refusal).__name__
        seconds = time.process_time() - begun
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        found[path] = (error, seconds, grown << 10)
    return found


def main() -> None:
    kind, *paths = sys.argv[1:]
    act: Callable[[str], object]
    if kind == "examine":
        act = lambda path: examine(Path(path).read_bytes())  # noqa: E731
        examine(good())
    else:
        import torch

        import shardckpt

        torch.set_num_threads(1)
        # what the first load imports and starts is not what is measured
        shardckpt.load(paths.pop(0))
        act = shardckpt.load if kind == "load" else lambda path: shardckpt.load(path, {"big": torch.zeros(3)})
    limit()
    print(json.dumps(look(paths, act)))


if __name__ == "__main__":
    main()
