# SPDX-License-Identifier: Apache-2.0
"""No good checkpoint is replaced by what a GPU with damaged memory holds."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..errors import DeviceMemoryError
from .nvml import GPU, Nvml, gpu_of, local_nvml

logger = logging.getLogger("shardckpt")


@dataclass(slots=True)
class MemoryErrors:
    """Uncorrected memory errors of a GPU."""

    gpu: GPU
    """Which one."""
    count: int
    """What its counter, which starts when the driver is loaded, said last."""
    new: int = 0
    """How many of them came while it was watched."""

    def __str__(self) -> str:
        return f"{self.gpu}: {self.new} since the state was made or restored, {self.count} since the driver was loaded"


class MemoryErrorGuard:
    """Watches this rank's GPUs for memory errors that ECC could not correct; the current CUDA device from the beginning.

    A GPU whose errors are not counted (no ECC, no driver library in the container) is taken to have none; the log says so.
    """

    def __init__(self, nvml: Nvml | None = None, cuda: Any = torch.cuda) -> None:
        self._nvml = nvml
        self._cuda = cuda
        self._devices: set[torch.device] = set()
        self._watched: dict[str, MemoryErrors] = {}
        self._warned: dict[str, int] = {}
        self.start_anew()

    def watch(self, devices: Iterable[torch.device]) -> None:
        """From now on, errors of the CUDA devices among ``devices`` are new; no change for those already watched."""
        for device in devices:
            if device.type != "cuda" or device in self._devices:
                continue
            self._devices.add(device)
            gpu = gpu_of(device, self._nvml, self._cuda)
            if gpu is not None and gpu.uncorrected_errors is not None:
                self._watched.setdefault(gpu.uuid, MemoryErrors(gpu, gpu.uncorrected_errors))

    def start_anew(self) -> None:
        """Forget all errors: what they damaged has been replaced, as by a restore. Watches the current CUDA device at once."""
        self._devices.clear()
        self._watched.clear()
        self._warned.clear()
        if self._cuda.is_initialized():
            self.watch([torch.device("cuda", self._cuda.current_device())])

    def check(self) -> list[MemoryErrors]:
        """Read the counters; the watched GPUs that have had errors."""
        nvml = local_nvml() if self._nvml is None else self._nvml
        for errors in self._watched.values():
            count = nvml.uncorrected_errors(errors.gpu.uuid)
            if count is not None:
                # a counter that was reset has gone down
                errors.new += max(0, count - errors.count)
                errors.count = count
        return [errors for errors in self._watched.values() if errors.new]

    def require_sound(self, rank: int, policy: Literal["refuse", "warn"], devices: Iterable[torch.device]) -> None:
        """Raise `DeviceMemoryError` if the GPUs that hold the state of ``rank`` have had errors, or warn of each new one once.

        A refusal stands until `start_anew`: what errors have damaged stays damaged.
        """
        self.watch(devices)
        found = self.check()
        if found and policy == "refuse":
            raise _refusal(rank, found)
        for errors in found:
            if self._warned.get(errors.gpu.uuid) != errors.new:
                self._warned[errors.gpu.uuid] = errors.new
                logger.warning("rank %d saves a state that may be damaged by uncorrected memory errors of %s", rank, errors)


def _refusal(rank: int, found: list[MemoryErrors]) -> DeviceMemoryError:
    return DeviceMemoryError(
        f"rank {rank} does not save: memory errors that ECC could not correct may have damaged its state "
        f"({'; '.join(map(str, found))}). Earlier checkpoints stay as they are. Stop, take the GPU out of use until it has "
        "been reset or replaced (nvidia-smi -q -d ECC,ROW_REMAPPER), and resume from the newest checkpoint; or restore that "
        "one here, which ends the refusal. Options(on_memory_errors='warn') saves all the same",
        rank=rank,
        gpus=[{"uuid": e.gpu.uuid, "index": e.gpu.index, "name": e.gpu.name, "count": e.count, "new": e.new} for e in found],
    )
