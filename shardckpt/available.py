# SPDX-License-Identifier: Apache-2.0
"""How much host memory is to be had: by the machine, and by the control groups (containers, jobs) that this process is in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

Read = Callable[[str], str]
_NO_LIMIT = 1 << 60
"""Version 1 says so by a number that is larger than any memory."""


def read_system_file(path: str) -> str:
    """A file in which the kernel tells of the system; raises OSError where there is none."""
    return Path(path).read_text()


def available_memory(read: Read = read_system_file) -> int | None:
    """Bytes that can be taken before the kernel kills somebody; None where the system does not tell.

    Page cache counts as available, in the machine and in groups. Source: proc(5), "Control Group v2" and "Memory Resource
    Controller" (of version 1) in the kernel's documentation.
    """
    found = [*_of_machine(read), *(limit - used for limit, used in _groups(read))]
    return max(0, min(found)) if found else None


def memory_limit(read: Read = read_system_file) -> int | None:
    """Bytes that the tightest of this process's control groups may take; None without a limit."""
    return min((limit for limit, _ in _groups(read)), default=None)


def _of_machine(read: Read) -> Iterator[int]:
    with suppress(OSError, ValueError):
        for line in read("/proc/meminfo").splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024


def _groups(read: Read) -> Iterator[tuple[int, int]]:
    """Limit, and what is taken and cannot be given back, of this process's groups and those around them."""
    with suppress(OSError, ValueError):
        for line in read("/proc/self/cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                top, look = "/sys/fs/cgroup", _of_version_2
            elif "memory" in controllers.split(","):
                top, look = "/sys/fs/cgroup/memory", _of_version_1
            else:
                continue
            parts = [part for part in path.split("/") if part]
            for depth in range(len(parts) + 1):
                # a group without a limit has no file that says so, or a word or a huge number in it
                with suppress(OSError, ValueError):
                    limit, used = look("/".join([top, *parts[:depth]]), read)
                    if limit < _NO_LIMIT:
                        yield limit, used


def _of_version_2(group: str, read: Read) -> tuple[int, int]:
    limit = int(read(f"{group}/memory.max"))
    stat = _counters(read(f"{group}/memory.stat"))
    return limit, int(read(f"{group}/memory.current")) - stat.get("file", 0) + stat.get("shmem", 0)


def _of_version_1(group: str, read: Read) -> tuple[int, int]:
    limit = int(read(f"{group}/memory.limit_in_bytes"))
    # with those of the groups in it, as the usage is
    stat = _counters(read(f"{group}/memory.stat"))
    cached = stat.get("total_active_file", 0) + stat.get("total_inactive_file", 0)
    return limit, int(read(f"{group}/memory.usage_in_bytes")) - cached


def _counters(text: str) -> dict[str, int]:
    return {name: int(count) for name, count in (line.split() for line in text.splitlines())}
