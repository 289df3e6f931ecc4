# SPDX-License-Identifier: Apache-2.0
"""What the checks look at, and how they find out."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..available import available_memory, memory_limit, read_system_file
from ..environment import ROOT
from ..gpu import GPU, Nvml, gpu_of, local_nvml, spellings
from ..store import Store
from ..store.filesystem import OPERATING_SYSTEM, FileSystem
from ..store.mounts import Mount, mount_of
from ..store.trial import Trial, try_store
from .network import Network, endpoint_in
from .speed import Staging, measure_copying, measure_staging

_NVIDIA = 0x10DE
_DISPLAY = 0x03
"""The base class of PCI devices that GPUs are of, with a screen or without."""


def total_memory() -> int:
    """Physical memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def usable_cpus() -> frozenset[int]:
    """The CPUs that this process may use."""
    return frozenset(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def nvidia_gpus(root: Path = Path("/")) -> list[str]:
    """What shows that there are GPUs of NVIDIA, whether a driver works or not: their PCI addresses, or else device files."""
    on_bus = [entry.name for entry in _entries(root / "sys/bus/pci/devices") if _is_nvidia_gpu(entry)]
    return on_bus or [f"/dev/{entry.name}" for entry in _entries(root / "dev") if re.fullmatch(r"nvidia\d+", entry.name)]


def _entries(directory: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from sorted(directory.iterdir())


def _is_nvidia_gpu(device: Path) -> bool:
    try:
        vendor, kind = (int(read_system_file(f"{device}/{name}"), 16) for name in ("vendor", "class"))
    except (OSError, ValueError):
        return False
    return vendor == _NVIDIA and kind >> 16 == _DISPLAY


def reason_of(error: Exception) -> str:
    """The first line of what an error says, or what it is if it says nothing."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


@dataclass
class Machine:
    """This machine, or parts of another one, that tests bring."""

    nvml: Nvml = field(default_factory=local_nvml)
    """The NVIDIA driver's library."""
    nvidia_gpus: Callable[[], list[str]] = nvidia_gpus
    """What shows GPUs where the driver does not."""
    cuda: Any = torch.cuda
    """torch.cuda."""
    cuda_version: str | None = torch.version.cuda
    """Of CUDA that torch was built with; None without."""
    torch_version: str = str(torch.__version__)
    """Of torch itself."""
    total_memory: int = field(default_factory=total_memory)
    """Bytes."""
    available_memory: Callable[[], int | None] = available_memory
    """Bytes that can be taken now."""
    memory_limit: Callable[[], int | None] = memory_limit
    """Bytes that a container or job may take; None without such a limit."""
    cpus: frozenset[int] = field(default_factory=usable_cpus)
    """Those that this process may use."""
    measure_copying: Callable[[int], float] = measure_copying
    """Copies that many bytes in host memory; the speed in bytes per second."""
    measure_staging: Callable[[GPU, Nvml], Staging] = measure_staging
    """Copies from a GPU as saves do. Raises whatever CUDA and the system do."""
    patience: float = 6.0
    """Seconds after which no further GPU is measured; eight fit, each of which has to be set up first for about half a one."""
    root: str | None = None
    """Where the checkpoints of a run go, a path or URL; None leaves storage alone."""
    ranks_per_node: int | None = None
    """How many ranks will run here; None when that is not known."""
    world_size: int | None = None
    """How many ranks will run in all; None when that is not known."""
    endpoint: str | None = None
    """Where the nodes of a job find each other, HOST or HOST:PORT; None when that is not known."""
    fs: FileSystem = OPERATING_SYSTEM
    """Local storage."""
    mount_of: Callable[[str], Mount | None] = mount_of
    """What the system tells of the file system of a directory."""
    try_store: Callable[[Store, int, FileSystem], Trial] = try_store
    """Writes and reads at most so many bytes."""
    network: Network = field(default_factory=Network)
    """Names, addresses and connections."""
    staged: dict[str, Staging] = field(default_factory=dict)
    """What `measure_staging` found, by the GPU's UUID."""

    @staticmethod
    def with_environment(environ: Mapping[str, str] = os.environ, **given: Any) -> Machine:
        """This machine, with what launchers say in the environment where it is not ``given`` (or is None)."""
        known: dict[str, Any] = {
            "root": environ.get(ROOT) or None,
            "ranks_per_node": _count(environ.get("LOCAL_WORLD_SIZE")),
            "world_size": _count(environ.get("WORLD_SIZE")),
            "endpoint": endpoint_in(environ),
        }
        return Machine(**known | {name: value for name, value in given.items() if value is not None})

    @cached_property
    def gpus(self) -> list[GPU]:
        """Those that torch may use; else all that the driver shows."""
        usable = [self._gpu(index, told) for index, told in self._devices.items() if not isinstance(told, Exception)]
        if usable:
            return usable
        found = (self.nvml.describe(uuid) for uuid in self.nvml.uuids())
        return [gpu for gpu in found if gpu is not None]

    @property
    def refused(self) -> dict[int, str]:
        """Why CUDA does not work on a device that it counts, by its number."""
        return {index: reason_of(told) for index, told in self._devices.items() if isinstance(told, Exception)}

    @cached_property
    def _devices(self) -> dict[int, Any]:
        """What torch tells of each CUDA device, which may be an error."""
        return {index: self._ask(index) for index in range(self.cuda.device_count())} if self.cuda.is_available() else {}

    def _ask(self, index: int) -> Any:
        try:
            return self.cuda.get_device_properties(index)
        # torch has several classes of errors for this, not all of them of one kind
        except Exception as error:
            return error

    def _gpu(self, index: int, properties: Any) -> GPU:
        gpu = gpu_of(torch.device("cuda", index), self.nvml, self.cuda)
        if gpu is not None:
            return gpu
        return GPU(
            uuid=spellings(str(properties.uuid))[0],
            index=index,
            name=properties.name,
            bus_id=None,
            numa_node=None,
            cpus=(),
            link=None,
            max_link=None,
            memory_total=properties.total_memory,
            memory_free=None,
            uncorrected_errors=None,
        )


def _count(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() and int(text) else None
