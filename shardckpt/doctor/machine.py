# SPDX-License-Identifier: Apache-2.0
"""What the checks look at, and how they find out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..available import available_memory, memory_limit
from ..environment import ROOT
from ..gpu import GPU, Nvml, gpu_of, local_nvml
from ..store import Store
from ..store.filesystem import OPERATING_SYSTEM, FileSystem
from ..store.mounts import Mount, mount_of
from ..store.trial import Trial, try_store
from .network import Network, endpoint_in
from .speed import Staging, measure_copying, measure_staging


def total_memory() -> int:
    """Physical memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def usable_cpus() -> frozenset[int]:
    """The CPUs that this process may use."""
    return frozenset(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


@dataclass
class Machine:
    """This machine, or parts of another one, that tests bring."""

    nvml: Nvml = field(default_factory=local_nvml)
    """The NVIDIA driver's library."""
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
    """Copies from a GPU as saves do. Raises `RuntimeError`."""
    patience: float = 2.0
    """Seconds after which no further GPU is measured: each has to be set up first, which takes a good part of one."""
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
        if self.cuda.is_available():
            return [self._gpu(index) for index in range(self.cuda.device_count())]
        found = (self.nvml.describe(uuid) for uuid in self.nvml.uuids())
        return [gpu for gpu in found if gpu is not None]

    def _gpu(self, index: int) -> GPU:
        gpu = gpu_of(torch.device("cuda", index), self.nvml, self.cuda)
        if gpu is not None:
            return gpu
        properties = self.cuda.get_device_properties(index)
        return GPU(
            uuid=str(properties.uuid),
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
