# SPDX-License-Identifier: Apache-2.0
"""The part of a rank's file that lies on GPUs, on its way to host memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import chain

import torch

from .gpu import DeviceCopier, PendingCopies
from .stage import FileData, Part


def on_cuda(tensor: torch.Tensor) -> bool:
    """Whether a tensor is copied on a stream beside the current one; what is elsewhere is copied by threads."""
    return tensor.is_cuda


class DeviceCopies:
    """Copies that are under way on several GPUs; none at all where there is nothing on them."""

    def __init__(self, pending: Sequence[PendingCopies] = ()) -> None:
        self._pending = pending

    def __bool__(self) -> bool:
        return bool(self._pending)

    def wait_on_current_streams(self) -> None:
        """Make what the GPUs are given from now on, on their current streams, wait for the copies; the thread goes on."""
        for copies in self._pending:
            copies.wait_on_current_stream()

    def synchronize(self) -> None:
        """Return when everything is in host memory, or no more will come. Raises `RuntimeError` if a GPU has failed."""
        errors = []
        for copies in self._pending:
            try:
                copies.synchronize()
            except RuntimeError as error:
                errors.append(error)
        if errors:
            raise errors[0]


class DeviceStaging:
    """Starts copies from GPUs, with streams and a little of their memory that are kept from save to save."""

    def __init__(
        self,
        takes: Callable[[torch.Tensor], bool] = on_cuda,
        make_copier: Callable[[torch.device], DeviceCopier] = DeviceCopier,
    ) -> None:
        """``takes`` says which tensors are copied here."""
        self.takes = takes
        self._make_copier = make_copier
        self._copiers: dict[torch.device, DeviceCopier] = {}

    def start(self, data: FileData, memory: torch.Tensor, select: Callable[[str], bool] = lambda name: True) -> DeviceCopies:
        """Copy the selected tensors that lie on GPUs to their places in ``memory``, a flat tensor for the whole region.

        Returns at once, if the memory is page-locked. The copies see the values that the current streams lead to.
        """
        parts: defaultdict[torch.device, list[Part]] = defaultdict(list)
        taken = {name for name, tensor in data.tensors.items() if self.takes(tensor) and select(name)}
        # whole, in as few copies as can be
        for part in chain(*data.where.cut(max(1, data.nbytes))) if taken else ():
            if part.name in taken:
                parts[data.tensors[part.name].device].append(part)
        pending: list[PendingCopies] = []
        try:
            for device, chosen in parts.items():
                pending.append(self._start(device, chosen, data, memory))
        except BaseException:
            # nothing may be written to the memory when it has gone to somebody else
            DeviceCopies(pending).synchronize()
            raise
        return DeviceCopies(pending)

    def close(self) -> None:
        """Give the memory of the GPUs back."""
        for copier in self._copiers.values():
            copier.close()
        self._copiers.clear()

    def _start(self, device: torch.device, parts: Sequence[Part], data: FileData, memory: torch.Tensor) -> PendingCopies:
        if device not in self._copiers:
            self._copiers[device] = self._make_copier(device)
        copier = self._copiers[device]
        copier.begin()
        try:
            for part in parts:
                copier.copy(data.tensors[part.name], part.start, part.stop, memory, part.offset)
        except BaseException:
            copier.finish().synchronize()
            raise
        return copier.finish()
