# SPDX-License-Identifier: Apache-2.0
"""What a reader has to know about the machine to make sense of a measurement."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch

from .._version import __version__
from .disk import file_system_of, takes_direct


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Facts about the machine and what runs on it."""

    cores: int
    """CPU cores that this process may use."""
    memory_bytes: int
    """Physical memory."""
    processor: str
    """Name of the CPU, or its architecture."""
    system: str
    """Operating system and its release."""
    folder: str
    """Where files were written; removed since."""
    file_system: str
    """Its file system."""
    device: str
    """What that is mounted from."""
    o_direct: bool
    """Whether it takes O_DIRECT."""
    python: str
    """Version."""
    torch: str
    """Version."""
    shardckpt: str
    """Version."""

    def __str__(self) -> str:
        direct = "O_DIRECT" if self.o_direct else "no O_DIRECT"
        memory = f"{self.memory_bytes / (1 << 30):.0f} GiB"
        return (
            f"{self.cores} cores ({self.processor}), {memory}, {self.system}; {self.file_system} on {self.device}, {direct}; "
            f"torch {self.torch}, Python {self.python}, shardckpt {self.shardckpt}"
        )


def describe_machine(folder: str) -> Machine:
    """The facts, for files in ``folder``."""
    file_system, device = file_system_of(folder)
    return Machine(
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        processor=_processor(),
        system=f"{platform.system()} {platform.release()}",
        folder=os.path.dirname(os.path.abspath(folder)),
        file_system=file_system or "unknown file system",
        device=device or "unknown device",
        o_direct=takes_direct(folder),
        python=platform.python_version(),
        torch=str(torch.__version__),
        shardckpt=__version__,
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
