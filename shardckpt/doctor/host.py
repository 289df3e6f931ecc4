# SPDX-License-Identifier: Apache-2.0
"""Checks of the host: versions, memory, and how fast it is copied."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator

from .._version import __version__
from .finding import Finding, gigabytes
from .machine import Machine, reason_of

OLDEST_TORCH = (2, 6)
"""As setup.cfg says."""
_COPIED_BYTES = 256 << 20
_LITTLE_MEMORY = 1 << 30
_SLOW_COPY = 2e9
"""Bytes per second; a core of any server of the last ten years copies three times as fast."""


def check_versions(machine: Machine) -> Iterator[Finding]:
    """Which software this is."""
    built = "without CUDA" if machine.cuda_version is None else f"for CUDA {machine.cuda_version}"
    driver, failure = machine.nvml.driver, machine.nvml.failure
    is_absent = failure is not None and failure.is_absence
    shown = "no NVIDIA driver" if is_absent else f"NVIDIA driver {driver or 'of unknown version'}"
    values = {
        "shardckpt": __version__,
        "torch": machine.torch_version,
        "cuda": machine.cuda_version,
        "driver": driver,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }
    here = f"Python {values['python']}, {values['system']}"
    text = f"shardckpt {__version__}, torch {machine.torch_version} {built}, {shown}, {here}"
    numbers = re.match(r"(\d+)\.(\d+)", machine.torch_version)
    if numbers is not None and (int(numbers[1]), int(numbers[2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        yield Finding("versions", "problem", f"{text}: this torch is too old", f"pip install 'torch>={oldest}'", values)
    else:
        yield Finding("versions", "ok", text, values=values)


def check_memory(machine: Machine) -> Iterator[Finding]:
    """Whether there is host memory to stage a state in."""
    limit, available = machine.memory_limit(), machine.available_memory()
    is_limited = limit is not None and limit < machine.total_memory
    total = limit if limit is not None and is_limited else machine.total_memory
    values = {"total": machine.total_memory, "limit": limit, "available": available}
    whole = gigabytes(total) + (", the limit of the container or job" if is_limited else "")
    if available is None:
        yield Finding("host memory", "ok", f"{whole}; the system does not tell how much is free", values=values)
    elif available < _LITTLE_MEMORY:
        yield Finding(
            "host memory",
            "warning",
            f"{gigabytes(available)} available of {whole}",
            "asynchronous saves stage each rank's shard in host memory, and go chunk by chunk, holding training up, where "
            "there is no room: give the job or container more memory, or start fewer data loader workers",
            values,
        )
    else:
        yield Finding("host memory", "ok", f"{gigabytes(available)} available of {whole}", values=values)


def check_copying(machine: Machine) -> Iterator[Finding]:
    """How fast a thread copies host memory, which is what staging takes without a GPU."""
    available = machine.available_memory()
    nbytes = _COPIED_BYTES if available is None else min(_COPIED_BYTES, available // 8)
    nbytes -= nbytes % 4096
    if not nbytes:
        yield Finding("host copy", "warning", "not measured: there is no memory for it", "see host memory")
        return
    try:
        speed = machine.measure_copying(nbytes)
    except OSError as error:
        text = f"not measured: a process cannot have {gigabytes(2 * nbytes)} of memory ({reason_of(error)})"
        remedy = "raise the limit of its address space (ulimit -v), or see vm.overcommit_memory and the container's limits"
        yield Finding("host copy", "problem", text, remedy)
        return
    text, values = f"{gigabytes(speed)}/s by one thread", {"bytes_per_second": speed}
    if speed < _SLOW_COPY:
        remedy = "look for other work on these cores, a CPU quota (cpu.max of the container), or swapping (vmstat 1)"
        yield Finding("host copy", "warning", text, remedy, values)
    else:
        yield Finding("host copy", "ok", text, values=values)
