# SPDX-License-Identifier: Apache-2.0
"""What the NVIDIA driver tells of GPUs: where they are attached, how fast, and whether their memory is sound.

Nothing here fails a save: what cannot be learnt is None, and said once in the log.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("shardckpt")

# Per generation: transfers per second and lane, and the share of bits that is not spent on line coding (8b/10b, 128b/130b; in
# generations 6 and 7, flits of 256 bytes of which 236 carry packets). PCI Express Base Specification, revisions 2.1 to 7.0.
_PCIE = {
    1: (2.5e9, 8 / 10),
    2: (5e9, 8 / 10),
    3: (8e9, 128 / 130),
    4: (16e9, 128 / 130),
    5: (32e9, 128 / 130),
    6: (64e9, 236 / 256),
    7: (128e9, 236 / 256),
}
_AFFINITY_WORDS = 64
"""64-bit words that the driver may fill with a set of CPUs or of NUMA nodes: enough for 4,096."""


@dataclass(frozen=True, slots=True)
class Link:
    """A PCI Express link."""

    generation: int
    """1 to 7."""
    width: int
    """Lanes."""

    @property
    def bytes_per_second(self) -> float | None:
        """Limit in one direction, before packet headers (which take another tenth or so); None for unknown generations."""
        if self.generation not in _PCIE:
            return None
        transfers, payload = _PCIE[self.generation]
        return transfers * payload * self.width / 8

    def __str__(self) -> str:
        return f"gen {self.generation} x{self.width}"


@dataclass(frozen=True, slots=True)
class GPU:
    """One GPU, or one MIG slice of it; None stands for what the driver does not tell."""

    uuid: str
    """``GPU-...`` or ``MIG-...``."""
    index: int | None
    """Number of the CUDA device in this process; None when torch does not see it."""
    name: str | None
    """Product."""
    bus_id: str | None
    """PCI address as the kernel writes it, ``0000:3b:00.0``."""
    numa_node: int | None
    """The node of host memory that it is attached to."""
    cpus: tuple[int, ...]
    """The CPUs near it, ascending; empty when not known."""
    link: Link | None
    """As it is now; slower than it could be while the GPU is idle."""
    max_link: Link | None
    """The best that GPU and slot can do together."""
    memory_total: int | None
    """Bytes."""
    memory_free: int | None
    """Bytes that no process has taken."""
    uncorrected_errors: int | None
    """Memory errors that ECC found and could not correct, since the driver was loaded."""

    def __str__(self) -> str:
        number = "GPU" if self.index is None else f"GPU {self.index}"
        return f"{number} ({', '.join(filter(None, (self.name, self.bus_id, self.uuid)))})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why the driver did not do what it was asked."""

    kind: str
    """Name of the error in the library, such as ``GpuIsLost``; empty for an error that has none."""
    reason: str
    """In words."""

    @property
    def is_absence(self) -> bool:
        """Whether there is no driver at all, as far as can be seen from here."""
        return self.kind == "LibraryNotFound"

    @property
    def is_refusal(self) -> bool:
        """Whether this process may not use what is there."""
        return self.kind == "NoPermission"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What one GPU in the driver's list of all GPUs says when it is called."""

    number: int
    """Its place in the list."""
    uuid: str | None
    """None when it does not answer."""
    bus_id: str | None
    """PCI address; None when not even that is known."""
    failure: Failure | None
    """Why it does not answer; None when it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryHealth:
    """What a GPU keeps of its memory errors across restarts of the driver; None stands for what it does not tell."""

    ecc: bool | None
    """Whether errors are looked for at all."""
    next_ecc: bool | None
    """Whether they will be after the next reset."""
    beyond_repair: bool | None
    """Whether there was no spare row left for a damaged one."""
    repair_pending: bool | None
    """Whether damaged memory waits for a reset that takes it out of use for good."""


def read_numa_node(bus_id: str) -> int | None:
    """The node that the kernel says a PCI device is attached to; None where there is just one, or none is known."""
    try:
        node = int(Path(f"/sys/bus/pci/devices/{bus_id}/numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


class Nvml:
    """The driver's management library. Never raises: a call that fails gives None, and one line in the log."""

    def __init__(self, library: Any, numa_node: Callable[[str], int | None] = read_numa_node) -> None:
        """``library`` is the module pynvml."""
        self._library = library
        self._numa_node = numa_node
        self._said: set[tuple[str, str]] = set()
        self._error_counters: dict[str, Callable[[], int | None]] = {}
        self.failure: Failure | None = None
        """Why there is nothing to ask; None when there is."""
        try:
            library.nvmlInit()
        except library.NVMLError as error:
            self.failure = _failure(error)
            logger.info("no NVIDIA driver (%s): nothing is known of the memory errors and the place of GPUs", error)

    @property
    def missing(self) -> str | None:
        """The same in words."""
        return None if self.failure is None else self.failure.reason

    @property
    def driver(self) -> str | None:
        """Version of the driver."""
        version = self._ask("nvmlSystemGetDriverVersion")
        return None if version is None else str(version)

    def uuids(self) -> list[str]:
        """All GPUs of the machine that the driver shows here, whether CUDA may use them or not."""
        return [reply.uuid for reply in self.roll_call() if reply.uuid is not None]

    def roll_call(self) -> list[Reply]:
        """Call all GPUs of the machine, also those that are lost or not for this process."""
        return [self._call(number) for number in range(self._ask("nvmlDeviceGetCount") or 0)]

    def describe(self, uuid: str, index: int | None = None) -> GPU | None:
        """What is known of a GPU or MIG slice; None when the driver does not know it. ``index`` is that of its CUDA device."""
        handle = self._handle(uuid)
        if handle is None:
            return None
        whole = self._whole(uuid, handle)
        bus_id = self._bus_id(whole)
        memory = self._ask("nvmlDeviceGetMemoryInfo", handle)
        return GPU(
            uuid=uuid,
            index=index,
            name=self._ask("nvmlDeviceGetName", handle),
            bus_id=bus_id,
            numa_node=self._node(whole, bus_id),
            cpus=self._set("nvmlDeviceGetCpuAffinity", whole, _AFFINITY_WORDS),
            link=self._link(whole, "Curr"),
            max_link=self._link(whole, "Max"),
            memory_total=None if memory is None else int(memory.total),
            memory_free=None if memory is None else int(memory.free),
            uncorrected_errors=self.uncorrected_errors(uuid),
        )

    def memory_health(self, uuid: str) -> MemoryHealth:
        """What a GPU, or the one that a MIG slice is a part of, remembers of errors of its memory."""
        handle = self._handle(uuid)
        if handle is None:
            return MemoryHealth(ecc=None, next_ecc=None, beyond_repair=None, repair_pending=None)
        whole = self._whole(uuid, handle)
        ecc, next_ecc = self._ask("nvmlDeviceGetEccMode", whole) or (None, None)
        # GPUs up to Turing retire pages, later ones remap rows
        _, _, pending, failed = self._ask("nvmlDeviceGetRemappedRows", whole) or (None, None, None, None)
        if pending is None:
            pending = self._ask("nvmlDeviceGetRetiredPagesPendingStatus", whole)
        return MemoryHealth(
            ecc=_truth(ecc), next_ecc=_truth(next_ecc), beyond_repair=_truth(failed), repair_pending=_truth(pending)
        )

    def uncorrected_errors(self, uuid: str) -> int | None:
        """Memory errors of a GPU or MIG slice that ECC could not correct, since the driver was loaded; None if not counted.

        Counts of one GPU always come from the same counter, and may be compared.
        """
        if uuid in self._error_counters:
            return self._error_counters[uuid]()
        for counter in self._counters(uuid):
            count = counter()
            if count is not None:
                self._error_counters[uuid] = counter
                return count
        return None

    def _counters(self, uuid: str) -> Iterable[Callable[[], int | None]]:
        """Ways to count, best first: all memories of the GPU together, one by one, or only those of a MIG slice."""
        handle = self._handle(uuid)
        if handle is None:
            return
        whole = self._whole(uuid, handle)
        kind = (self._library.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, self._library.NVML_VOLATILE_ECC)
        yield functools.partial(self._ask, "nvmlDeviceGetTotalEccErrors", whole, *kind)
        places = (self._library.NVML_MEMORY_LOCATION_DEVICE_MEMORY, self._library.NVML_MEMORY_LOCATION_SRAM)
        for device in (whole, handle):
            counters = [
                functools.partial(self._ask, "nvmlDeviceGetMemoryErrorCounter", device, *kind, place) for place in places
            ]
            yield functools.partial(_add_up, [counter for counter in counters if counter() is not None])

    def _handle(self, uuid: str) -> Any:
        """None for a UUID that the driver does not know, which is no news: it may be one of several spellings."""
        try:
            return None if self.missing else self._library.nvmlDeviceGetHandleByUUID(uuid)
        except self._library.NVMLError_NotFound:
            return None
        except self._library.NVMLError as error:
            # it may fail because of any GPU, whichever was asked for
            for reply in self.roll_call():
                if reply.uuid == uuid:
                    return self._ask("nvmlDeviceGetHandleByIndex", reply.number)
            return self._give_up("nvmlDeviceGetHandleByUUID", str(error))

    def _call(self, number: int) -> Reply:
        handle = None
        try:
            handle = self._library.nvmlDeviceGetHandleByIndex(number)
            uuid = str(self._library.nvmlDeviceGetUUID(handle))
        except self._library.NVMLError as error:
            self._give_up("nvmlDeviceGetHandleByIndex" if handle is None else "nvmlDeviceGetUUID", str(error))
            bus_id = None if handle is None else self._bus_id(handle)
            return Reply(number=number, uuid=None, bus_id=bus_id, failure=_failure(error))
        return Reply(number=number, uuid=uuid, bus_id=self._bus_id(handle), failure=None)

    def _whole(self, uuid: str, handle: Any) -> Any:
        """The GPU that a MIG slice is a part of: it alone has a bus and a place."""
        if not uuid.startswith("MIG-"):
            return handle
        return self._ask("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle) or handle

    def _bus_id(self, handle: Any) -> str | None:
        info = self._ask("nvmlDeviceGetPciInfo", handle)
        if info is None:
            return None
        domain, _, rest = str(info.busId).lower().partition(":")
        # the driver writes the domain with eight digits, the kernel with four unless it needs more
        return f"{int(domain, 16):04x}:{rest}" if rest else None

    def _node(self, handle: Any, bus_id: str | None) -> int | None:
        # Not nvmlDeviceGetNumaNodeId: that is the node which the GPU's own memory is, on machines where it is one.
        node = None if bus_id is None else self._numa_node(bus_id)
        if node is None:
            nodes = self._set("nvmlDeviceGetMemoryAffinity", handle, _AFFINITY_WORDS, self._library.NVML_AFFINITY_SCOPE_NODE)
            node = nodes[0] if nodes else None
        return node

    def _link(self, handle: Any, which: str) -> Link | None:
        generation = self._ask(f"nvmlDeviceGet{which}PcieLinkGeneration", handle)
        width = self._ask(f"nvmlDeviceGet{which}PcieLinkWidth", handle)
        return Link(int(generation), int(width)) if generation and width else None

    def _set(self, function: str, *arguments: Any) -> tuple[int, ...]:
        """The numbers whose bits are set in an array of 64-bit words."""
        words: Sequence[int] = self._ask(function, *arguments) or ()
        return tuple(at * 64 + bit for at, word in enumerate(words) for bit in range(64) if word >> bit & 1)

    def _ask(self, function: str, *arguments: Any) -> Any:
        if self.missing is not None:
            return None
        call = getattr(self._library, function, None)
        if call is None:
            return self._give_up(function, "this version of nvidia-ml-py does not have it")
        try:
            return call(*arguments)
        except self._library.NVMLError as error:
            return self._give_up(function, str(error))

    def _give_up(self, function: str, reason: str) -> None:
        if (function, reason) not in self._said:
            self._said.add((function, reason))
            logger.info("%s: %s; what it would tell of GPUs is left out", function, reason)


def _failure(error: Exception) -> Failure:
    # the library has a class for each error that it knows
    _, _, kind = type(error).__name__.partition("_")
    return Failure(kind=kind, reason=str(error))


def _truth(value: int | None) -> bool | None:
    return None if value is None else bool(value)


def _add_up(counters: Sequence[Callable[[], int | None]]) -> int | None:
    """The sum; None unless all of them tell, as a part of them is no count to compare with."""
    counts = [count for counter in counters if (count := counter()) is not None]
    return sum(counts) if counts and len(counts) == len(counters) else None


@functools.cache
def local_nvml() -> Nvml:
    """The driver's library of this machine, opened once per process and never closed: others in the process may use it."""
    # not above: it takes a while, and where there is no GPU nobody needs it
    import pynvml

    return Nvml(pynvml)


def spellings(uuid: str, environ: Mapping[str, str] = os.environ) -> list[str]:
    """How driver and CUDA may name the device whose bare UUID torch tells; the likeliest name first."""
    # CUDA numbers the devices that it was told of, in its own order: only the UUID says which one it is. A MIG slice has to be
    # named to be seen; torch may then tell its UUID or that of the whole GPU.
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    named = [visible.split(",")[0].strip()] if visible.startswith("MIG-") else []
    return [*named, f"GPU-{uuid}", f"MIG-{uuid}"]


def gpu_of(
    device: torch.device, nvml: Nvml | None = None, cuda: Any = torch.cuda, environ: Mapping[str, str] = os.environ
) -> GPU | None:
    """What the driver knows of a CUDA device of torch; None for any other device, and when it knows nothing."""
    if device.type != "cuda":
        return None
    nvml = local_nvml() if nvml is None else nvml
    try:
        index = cuda.current_device() if device.index is None else device.index
        uuid = str(cuda.get_device_properties(index).uuid)
    # no CUDA in this torch, no such device, a forked process, a GPU that does not work: torch has an error of its own for each
    except Exception as error:
        logger.info("torch does not tell which GPU %s is: %s", device, error)
        return None
    for name in spellings(uuid, environ):
        gpu = nvml.describe(name, index)
        if gpu is not None:
            return gpu
    if nvml.missing is None:
        logger.info("the NVIDIA driver does not know %s, whose UUID is %s", device, uuid)
    return None
