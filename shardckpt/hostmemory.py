# SPDX-License-Identifier: Apache-2.0
"""The host memory that staged states lie in: how much of it, where, and that it is used again by the next save."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

from .available import available_memory
from .buffer import Buffer
from .errors import ConfigError, HostMemoryError
from .feed import num_chunks
from .gpu import pin, unpin

logger = logging.getLogger("shardckpt")

_FALLBACK_CHUNKS = 16
PRUDENCE = 0.9
"""Share of the available memory that is taken at most."""


class HostMemory:
    """Memory for one staged file, kept from save to save and grown when a larger one comes.

    With ``shared`` it is a file in memory without a name, which another process maps through its descriptor. It is gone when
    the last process that has it is, however that ends, and no mount such as /dev/shm has to have room for it.
    """

    def __init__(
        self,
        *,
        limit: int | None = None,
        sharers: int = 1,
        shared: bool = False,
        available: Callable[[], int | None] = available_memory,
        pin: Callable[[int, int, Literal["auto", "always"]], bool] = pin,
        unpin: Callable[[int], None] = unpin,
    ) -> None:
        """``limit`` is in bytes, and this rank's share. Without one, ``sharers`` ranks share what is ``available``."""
        self._limit = limit
        self._sharers = sharers
        self._available = available
        self.fd = os.memfd_create("shardckpt", os.MFD_CLOEXEC) if shared else None
        """Descriptor of shared memory."""
        self._pin = pin
        self._unpin = unpin
        self._buffer: Buffer | None = None
        self._is_locked: bool | None = None

    def reserve(self, nbytes: int, chunk: int) -> Buffer:
        """Memory for a file of ``nbytes`` bytes, in whole chunks; for fewer chunks than that where more is not to be had.

        Raises `ConfigError` when the limit is below one chunk, `HostMemoryError` when the system has not even that.
        """
        wanted = max(1, num_chunks(nbytes, chunk)) * chunk
        if self._limit is not None and wanted > self._limit:
            wanted = self._limit // chunk * chunk
            if not wanted:
                raise ConfigError(
                    f"host_memory_limit leaves this rank {self._limit} bytes to stage its file in, and one chunk of it "
                    f"has {chunk}: set it to at least {chunk} bytes for each rank of the node"
                )
        if self._buffer is not None and self._buffer.size >= wanted:
            return self._buffer
        means = self._means()
        if means is not None and wanted > means:
            logger.warning("no %d bytes of host memory to stage a state in: it goes through %d bytes", wanted, means)
            wanted = max(1, means // chunk) * chunk
        if self._buffer is None or self._buffer.size < wanted:
            self._drop()
            self._buffer = self._allocate(wanted, chunk)
        return self._buffer

    def _means(self) -> int | None:
        """Bytes that this rank may take without starving the node; None when that is not known, or not asked."""
        available = self._available() if self._limit is None else None
        if available is None:
            return None
        held = 0 if self._buffer is None else self._buffer.size
        return held + int(PRUDENCE * available) // self._sharers

    def lock(self, mode: Literal["auto", "always"]) -> None:
        """Page-lock what was reserved, for GPUs to copy to; once, until other memory is reserved.

        If that is refused, ``always`` raises `ConfigError`, and ``auto`` leaves it at that.
        """
        if self._buffer is not None and self._is_locked is None:
            self._buffer.keep_from_forks()
            self._is_locked = self._pin(self._buffer.address, self._buffer.size, mode)

    def _drop(self) -> None:
        if self._buffer is not None and self._is_locked:
            self._unpin(self._buffer.address)
        self._buffer, self._is_locked = None, None

    def _allocate(self, wanted: int, chunk: int) -> Buffer:
        least = min(wanted, _FALLBACK_CHUNKS * chunk)
        for size in dict.fromkeys((wanted, least, chunk)):
            try:
                if self.fd is not None:
                    # takes the memory now: a write to a page that cannot be had would kill the process
                    os.posix_fallocate(self.fd, 0, size)
                return Buffer(size, self.fd)
            except (OSError, MemoryError) as error:
                logger.warning("no %d bytes of host memory to stage a state in: %s", size, error)
                cause = error
        raise HostMemoryError(
            f"there are not even {chunk} bytes of host memory to stage a state in: {cause}. "
            "Free memory, or save with wait=True",
            bytes=chunk,
        )

    def close(self) -> None:
        """Give the memory back, as soon as nobody uses it."""
        self._drop()
        if self.fd is not None:
            with suppress(OSError):
                os.close(self.fd)
            self.fd = None
