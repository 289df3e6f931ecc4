# SPDX-License-Identifier: Apache-2.0
"""Host memory near a GPU: pages come to lie on the NUMA node of the CPU that touches them first."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .nvml import GPU

logger = logging.getLogger("shardckpt")


@contextmanager
def near(gpu: GPU | None, system: Any = os) -> Iterator[None]:
    """Run the calling thread, and threads that it starts, on the CPUs near ``gpu`` while the block lasts.

    Nothing happens where they are not known, the process may not use any of them, or the system does not let a thread choose.
    """
    before = _move(gpu.cpus, system) if gpu is not None and gpu.cpus else None
    try:
        yield
    finally:
        if before is not None:
            try:
                system.sched_setaffinity(0, before)
            except OSError as error:
                logger.warning("a thread that was moved near %s cannot move back to CPUs %s: %s", gpu, sorted(before), error)


def _move(cpus: tuple[int, ...], system: Any) -> set[int] | None:
    """Move the calling thread; the CPUs that it had before, or None if it stays where it is."""
    # on Linux these calls are about one thread, and 0 is the calling one; other systems do not have them
    if not hasattr(system, "sched_setaffinity"):
        return None
    before: set[int] = system.sched_getaffinity(0)
    wanted = before & set(cpus)
    if not wanted or wanted == before:
        return None
    try:
        system.sched_setaffinity(0, wanted)
    except OSError as error:
        logger.info("host buffers lie wherever the kernel puts them: threads may not choose CPUs (%s)", error)
        return None
    return before
