# SPDX-License-Identifier: Apache-2.0
"""How much memory a process and all that it has started hold, at most, over a while."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path
from types import TracebackType

_PAUSE_SECONDS = 0.02
_LOOKS_PER_CENSUS = 10
"""Looks at the memory of known processes for each look for new ones, which costs more."""


def family_of(pid: int) -> list[int]:
    """``pid`` and all its descendants; only itself where the system does not tell."""
    family = [pid]
    for member in family:
        for thread in _children_files(member):
            family += [int(child) for child in _read(thread).split()]
    return family


def memory_of(family: list[int]) -> int:
    """Bytes of anonymous and shared memory of a family of processes.

    Pages of files (libraries) are left out. What is shared counts once: the member that maps most of it counts, because
    others only map what they were given by it.
    """
    anonymous, shared = 0, [0]
    for member in family:
        for line in _read(Path(f"/proc/{member}/status")).splitlines():
            key, _, rest = line.partition(":")
            if key == "RssAnon":
                anonymous += _kib(rest)
            elif key == "RssShmem":
                shared.append(_kib(rest))
    return anonymous + max(shared)


def give_back_free_memory() -> None:
    """Have the C library return to the system what was freed, where it can: what it keeps looks as if it were in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def memory_now() -> int:
    """`memory_of` this process and its descendants; 0 where the system does not tell."""
    return memory_of(family_of(os.getpid()))


class MemoryWatch:
    """Looks every 20 ms, while the block runs, how much memory this process and its descendants hold."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="bench-memory", daemon=True)
        self.peak = memory_now()
        """Most bytes at any look; 0 where the system does not tell."""

    def _look(self) -> None:
        looks = 0
        while not self._over.wait(_PAUSE_SECONDS):
            if looks % _LOOKS_PER_CENSUS == 0:
                family = family_of(os.getpid())
            self.peak = max(self.peak, memory_of(family))
            looks += 1

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()


def _children_files(pid: int) -> list[Path]:
    try:
        return [thread / "children" for thread in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []


def _read(path: Path) -> str:
    """The text of a file of /proc; empty when its process is gone."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _kib(text: str) -> int:
    return int(text.split()[0]) << 10
