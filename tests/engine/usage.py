# SPDX-License-Identifier: Apache-2.0
"""What a process and its children take from the system: counted, to find what is never given back."""

from __future__ import annotations

import dataclasses
import gc
import sys
import time

import psutil

MARK = "SHARDCKPT_TEST_MARK"
_PATIENCE_SECONDS = 30.0
_POLL_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Usage:
    """Totals over this process and all below it."""

    processes: int
    """How many they are."""
    threads: int
    """All of the system's, not only Python's."""
    descriptors: int
    """Open files, sockets, pipes, memory without a name."""
    shared: int
    """Mappings of shared memory."""
    objects: int
    """Blocks that Python has allocated, in this process only."""
    resident: int
    """Bytes of memory."""

    def counts(self) -> dict[str, int]:
        """What can be counted exactly."""
        return {name: getattr(self, name) for name in ("processes", "threads", "descriptors", "shared")}

    def growth(self, before: Usage) -> dict[str, int]:
        """What is counted now and was not there before; empty is good."""
        then = before.counts()
        return {name: count - then[name] for name, count in self.counts().items() if count > then[name]}


def is_dead(pid: int) -> bool:
    """Whether nothing of that process runs any more, though its parent may not have asked for its status yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def usage() -> Usage:
    """What is taken now."""
    gc.collect()
    me = psutil.Process()
    children = me.children(recursive=True)
    found = [me, *(child for child in children if child.status() != psutil.STATUS_ZOMBIE)]
    return Usage(
        processes=1 + len(children),
        threads=sum(process.num_threads() for process in found),
        descriptors=sum(process.num_fds() for process in found),
        shared=sum(is_shared_memory(mapped.path) for process in found for mapped in process.memory_maps(grouped=False)),
        objects=sys.getallocatedblocks(),
        resident=sum(process.memory_info().rss for process in found),
    )


def is_shared_memory(path: str) -> bool:
    """Whether a mapping of that name, as /proc has it, is memory that processes share."""
    return path.startswith(("/memfd:", "/dev/shm/"))


def usage_when_as_low_as(before: Usage) -> Usage:
    """The first usage that counts no more than ``before``; after some time, when there is none, what there is then.

    Threads and processes that have done their work take a moment to end.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        found = usage()
        if not found.growth(before) or time.monotonic() > deadline:
            return found
        time.sleep(_POLL_SECONDS)


def marked_processes(mark: str) -> list[psutil.Process]:
    """Living processes that were started with that value of `MARK` in their environment, whoever their parent is by now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until_ended(mark: str) -> list[psutil.Process]:
    """Marked processes that have not ended after some time."""
    return psutil.wait_procs(marked_processes(mark), timeout=2 * _PATIENCE_SECONDS)[1]
