# SPDX-License-Identifier: Apache-2.0
"""Rebuilds bytes of rank files that are lost or damaged, for whoever reads a checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from shardckpt.buffer import CHUNK, Buffer
from shardckpt.checksum import damaged_blocks, digests_between
from shardckpt.errors import ChecksumMismatch
from shardckpt.store import Store
from shardckpt.validate import Checkpoint

from .record import Parity, find_parity
from .xor import Others


class Rebuilder:
    """Rebuilds what is damaged, if the checkpoint has a parity; looks for that when it is first asked.

    Any thread may ask; one is served at a time, so that it all takes one more buffer.
    """

    def __init__(self, store: Store, prefix: str, checkpoint: Checkpoint) -> None:
        self._store = store
        self._prefix = prefix
        self._checkpoint = checkpoint
        self._lock = threading.Lock()
        self._looked = False
        self._parity: Parity | None = None
        self._others: dict[int, Others] = {}
        self._scratch: Buffer | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes that were read from storage so far, each verified."""
        return sum(others.bytes_read for others in self._others.values())

    def rebuild(self, file: int, start: int, stop: int, into: memoryview) -> bool:
        """Fill ``into`` with bytes ``[start, stop)`` of a rank file's data region, verified; False when there is no parity.

        ``start`` is at a block border, and ``into`` has room up to the next one after ``stop``. Each of the group's other
        files is read in that range, once. Raises `IntegrityError` or `StoreError`, which say why it cannot be done.
        """
        with self._lock:
            parity = self._find()
            if parity is None:
                return False
            if self._scratch is None:
                self._scratch = Buffer(max(CHUNK, self._checkpoint.plan.block_size))
            if file not in self._others:
                name = f"{self._prefix}{self._checkpoint.manifest.files[file].name}"
                bodies = [body for body in parity.bodies(parity.group_of[file]) if body.name != name]
                self._others[file] = Others(self._store, bodies, self._checkpoint.plan.block_size)
            self._others[file].combine(start, stop, into, self._scratch.bytes)
        self._verify(file, start, stop, into)
        return True

    def find_obstacle(self, file: int, sizes: Mapping[str, int]) -> str | None:
        """Why a rank file cannot be rebuilt wholly, as far as ``sizes`` of the files that are there tell; None when it can.

        "" when there is no parity. Raises `InvalidParity` and `StoreError`.
        """
        with self._lock:
            parity = self._find()
        if parity is None:
            return ""
        own = f"{self._prefix}{self._checkpoint.manifest.files[file].name}"
        for body in parity.bodies(parity.group_of[file]):
            if body.name != own and sizes.get(body.name) != body.size:
                return f"{body.name}, which it would take for that, is missing or not of full size too"
        return None

    def close(self) -> None:
        """Close what is open."""
        for others in self._others.values():
            others.close()

    def _find(self) -> Parity | None:
        if not self._looked:
            self._parity = find_parity(self._store, self._prefix, self._checkpoint)
            self._looked = True
        return self._parity

    def _verify(self, file: int, start: int, stop: int, data: memoryview) -> None:
        block_size = self._checkpoint.plan.block_size
        wanted = digests_between(self._checkpoint.digests[file], start, stop, block_size)
        if damaged_blocks(data[: stop - start], block_size, wanted):
            name = f"{self._prefix}{self._checkpoint.manifest.files[file].name}"
            raise ChecksumMismatch(
                f"what the parity in {self._store.url} gives for bytes [{start}, {stop}) of the data of {name} does not match "
                "the manifest",
                name=name,
            )
