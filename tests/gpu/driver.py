# SPDX-License-Identifier: Apache-2.0
"""A driver's library and a torch.cuda that tell of GPUs which are not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml

GIB = 1 << 30


@dataclass
class Card:
    """A GPU, or a MIG slice of ``parent``."""

    uuid: str
    name: str = "NVIDIA H100 80GB HBM3"
    bus_id: str = "00000000:3B:00.0"
    cpus: tuple[int, ...] = (0, 1, 64, 65)
    nodes: tuple[int, ...] = (0,)
    link: tuple[int, int] = (1, 16)
    max_link: tuple[int, int] = (5, 16)
    total: int = 80 * GIB
    free: int = 60 * GIB
    errors: int = 0
    """Uncorrected, of all memories."""
    at: dict[int, int] = field(default_factory=dict)
    """Uncorrected errors by memory, where these can be asked for."""
    ecc: tuple[int, int] = (1, 1)
    """Whether it is on, now and after the next reset."""
    remapped: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Rows that had errors which could be corrected, or could not; whether one is pending; whether one has failed."""
    retiring: int | None = None
    """Whether the retirement of a page is pending; None for a card that remaps rows."""
    parent: Card | None = None
    refuses: dict[str, int] = field(default_factory=dict)
    """Error codes of functions that do not work for it."""


class Driver:
    """Looks like the module pynvml; cards, and what does not work, can be changed at any time."""

    def __init__(self, *cards: Card, init: int | None = None) -> None:
        self.cards = list(cards)
        self.init = init
        self.gone: int | None = None
        """The error of every call, once the driver is gone."""
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        # constants and errors are the real ones; functions that are not written here do not exist
        if name.startswith("nvml"):
            raise AttributeError(name)
        return getattr(pynvml, name)

    def nvmlInit(self) -> None:
        if self.init is not None:
            raise pynvml.NVMLError(self.init)

    def nvmlSystemGetDriverVersion(self) -> str:
        self._check("nvmlSystemGetDriverVersion")
        return "580.82.07"

    def nvmlDeviceGetCount(self) -> int:
        self._check("nvmlDeviceGetCount")
        return len([card for card in self.cards if card.parent is None])

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        card = [card for card in self.cards if card.parent is None][index]
        self._check("nvmlDeviceGetHandleByIndex", card)
        return card

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Card:
        self._check("nvmlDeviceGetHandleByUUID")
        if any(pynvml.NVML_ERROR_GPU_IS_LOST in card.refuses.values() for card in self.cards):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        for card in self.cards:
            if card.uuid == uuid:
                return card
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, card: Card) -> Card:
        self._check("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", card)
        assert card.parent is not None
        return card.parent

    def nvmlDeviceGetUUID(self, card: Card) -> str:
        self._check("nvmlDeviceGetUUID", card)
        return card.uuid

    def nvmlDeviceGetName(self, card: Card) -> str:
        self._check("nvmlDeviceGetName", card)
        return card.name

    def nvmlDeviceGetPciInfo(self, card: Card) -> Any:
        self._check("nvmlDeviceGetPciInfo", card)
        return SimpleNamespace(busId=card.bus_id)

    def nvmlDeviceGetCpuAffinity(self, card: Card, words: int) -> list[int]:
        self._check("nvmlDeviceGetCpuAffinity", card)
        return _bits(card.cpus, words)

    def nvmlDeviceGetMemoryAffinity(self, card: Card, words: int, scope: int) -> list[int]:
        self._check("nvmlDeviceGetMemoryAffinity", card)
        assert scope == pynvml.NVML_AFFINITY_SCOPE_NODE
        return _bits(card.nodes, words)

    def nvmlDeviceGetCurrPcieLinkGeneration(self, card: Card) -> int:
        self._check("nvmlDeviceGetCurrPcieLinkGeneration", card)
        return card.link[0]

    def nvmlDeviceGetCurrPcieLinkWidth(self, card: Card) -> int:
        self._check("nvmlDeviceGetCurrPcieLinkWidth", card)
        return card.link[1]

    def nvmlDeviceGetMaxPcieLinkGeneration(self, card: Card) -> int:
        self._check("nvmlDeviceGetMaxPcieLinkGeneration", card)
        return card.max_link[0]

    def nvmlDeviceGetMaxPcieLinkWidth(self, card: Card) -> int:
        self._check("nvmlDeviceGetMaxPcieLinkWidth", card)
        return card.max_link[1]

    def nvmlDeviceGetMemoryInfo(self, card: Card) -> Any:
        self._check("nvmlDeviceGetMemoryInfo", card)
        return SimpleNamespace(total=card.total, free=card.free)

    def nvmlDeviceGetTotalEccErrors(self, card: Card, kind: int, counter: int) -> int:
        self._check("nvmlDeviceGetTotalEccErrors", card)
        assert (kind, counter) == (pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC)
        return card.errors

    def nvmlDeviceGetMemoryErrorCounter(self, card: Card, kind: int, counter: int, place: int) -> int:
        self._check("nvmlDeviceGetMemoryErrorCounter", card)
        assert (kind, counter) == (pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC)
        if place not in card.at:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return card.at[place]

    def nvmlDeviceGetEccMode(self, card: Card) -> list[int]:
        self._check("nvmlDeviceGetEccMode", card)
        return list(card.ecc)

    def nvmlDeviceGetRemappedRows(self, card: Card) -> tuple[int, int, int, int]:
        self._check("nvmlDeviceGetRemappedRows", card)
        if card.retiring is not None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return card.remapped

    def nvmlDeviceGetRetiredPagesPendingStatus(self, card: Card) -> int:
        self._check("nvmlDeviceGetRetiredPagesPendingStatus", card)
        if card.retiring is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return card.retiring

    def _check(self, function: str, card: Card | None = None) -> None:
        self.calls.append(function)
        code = self.gone if card is None or self.gone is not None else card.refuses.get(function)
        if code is not None:
            raise pynvml.NVMLError(code)


def _bits(numbers: tuple[int, ...], words: int) -> list[int]:
    assert max(numbers, default=0) < 64 * words
    return [sum(1 << n % 64 for n in numbers if n // 64 == at) for at in range(words)]


class Cuda:
    """Looks like torch.cuda, on a machine whose CUDA devices have these UUIDs, in this order."""

    def __init__(
        self,
        *uuids: str,
        current: int = 0,
        error: Exception | None = None,
        broken: Mapping[int, Exception] | None = None,
        initialized: bool = False,
    ) -> None:
        """``error`` comes of every device, those in ``broken`` of the devices with these numbers."""
        self.uuids = uuids
        self._broken = broken or {}
        self._initialized = initialized
        self._current = current
        self._error = error

    def is_available(self) -> bool:
        return bool(self.uuids)

    def is_initialized(self) -> bool:
        return self._initialized

    def device_count(self) -> int:
        return len(self.uuids)

    def current_device(self) -> int:
        return self._current

    def get_device_properties(self, index: int) -> Any:
        if self._error is not None:
            raise self._error
        if index in self._broken:
            raise self._broken[index]
        return SimpleNamespace(uuid=self.uuids[index], name="NVIDIA H100 80GB HBM3", total_memory=80 * GIB)
