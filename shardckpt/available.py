# SPDX-License-Identifier: Apache-2.0
"""How much host memory is to be had: by the machine, and by the control groups (containers, jobs) that this process is in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path


def read_system_file(path: str) -> str:
    """A file in which the kernel tells of the system; raises OSError where there is none."""
    return Path(path).read_text()


def available_memory(read: Callable[[str], str] = read_system_file) -> int | None:
    """Bytes that can be taken before the kernel kills somebody; None where the system does not tell.

    Page cache counts as available, in the machine and in groups. Source: proc(5), and "Control Group v2" in the kernel's
    documentation.
    """
    found = [*_of_machine(read), *_of_groups(read)]
    return max(0, min(found)) if found else None


def _of_machine(read: Callable[[str], str]) -> Iterator[int]:
    with suppress(OSError, ValueError):
        for line in read("/proc/meminfo").splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024


def _of_groups(read: Callable[[str], str]) -> Iterator[int]:
    """What the limits of version 2 leave, of this process's group and those around it."""
    with suppress(OSError):
        for line in read("/proc/self/cgroup").splitlines():
            if line.startswith("0::/"):
                parts = [part for part in line[3:].split("/") if part]
                for depth in range(len(parts) + 1):
                    yield from _left_in("/".join(["/sys/fs/cgroup", *parts[:depth]]), read)


def _left_in(group: str, read: Callable[[str], str]) -> Iterator[int]:
    # the outermost group has no limit and no file that says so
    with suppress(OSError, ValueError):
        limit = int(read(f"{group}/memory.max"))
        stat = dict(line.split() for line in read(f"{group}/memory.stat").splitlines())
        yield limit - int(read(f"{group}/memory.current")) + int(stat.get("file", 0)) - int(stat.get("shmem", 0))
