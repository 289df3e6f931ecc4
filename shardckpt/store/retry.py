# SPDX-License-Identifier: Apache-2.0
"""Tries the operations of another store again when their error may pass (detail ``transient=True``).

For object stores only. Each operation here can safely be repeated: reads change nothing, a delete of what is
gone is no error, a create that failed has made nothing, and a `put_if_absent` recognises its own earlier
success. A local store is never wrapped: there an I/O error does not pass, and the data of a failed flush is
gone.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from shardckpt.errors import ConfigError, StoreError
from shardckpt.store.base import Entry, FileReader, FileWriter, Store

logger = logging.getLogger("shardckpt")

ATTEMPTS: Final = 5
FIRST_PAUSE: Final = 0.25
LONGEST_PAUSE: Final = 8.0

_T = TypeVar("_T")


class RetryingStore(Store):
    """``store``, with each operation tried at most ``attempts`` times.

    The pause before retry n is a random part of ``first_pause * 2**n`` seconds, at most of ``longest_pause``:
    random so that the ranks of a job, which fail together, do not come back together. The last error is
    raised as it is.
    """

    def __init__(
        self,
        store: Store,
        attempts: int = ATTEMPTS,
        *,
        first_pause: float = FIRST_PAUSE,
        longest_pause: float = LONGEST_PAUSE,
        sleep: Callable[[float], None] = time.sleep,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        if attempts < 1:
            raise ConfigError(f"attempts is {attempts}; it must be 1 or more", attempts=attempts)
        self.url = store.url
        self._store = store
        self._attempts = attempts
        self._first_pause = first_pause
        self._longest_pause = longest_pause
        self._sleep = sleep
        self._uniform = uniform

    def create(self, name: str, size: int) -> FileWriter:
        return self.persist(lambda: self._store.create(name, size))

    def replace(self, name: str, size: int) -> FileWriter:
        return self.persist(lambda: self._store.replace(name, size))

    def open(self, name: str) -> FileReader:
        return _RetryingReader(self, self.persist(lambda: self._store.open(name)))

    def open_uncached(self, name: str) -> FileReader:
        return _RetryingReader(self, self.persist(lambda: self._store.open_uncached(name)))

    def put_if_absent(self, name: str, data: bytes) -> None:
        self.persist(lambda: self._store.put_if_absent(name, data))

    def put_if_allowed(self, name: str, data: bytes, allow: Callable[[], None]) -> None:
        self.persist(lambda: self._store.put_if_allowed(name, data, allow))

    def revoke(self, name: str) -> None:
        self.persist(lambda: self._store.revoke(name))

    def list(self, prefix: str = "") -> Sequence[Entry]:
        return self.persist(lambda: self._store.list(prefix))

    def delete(self, name: str) -> None:
        self.persist(lambda: self._store.delete(name))

    def empty_directories(self) -> Sequence[Entry]:
        return self.persist(self._store.empty_directories)

    def persist(self, operation: Callable[[], _T]) -> _T:
        """Call ``operation`` until it returns, or raises what does not pass, or no attempt is left."""
        for attempt in range(1, self._attempts):
            try:
                return operation()
            except StoreError as error:
                if not error.details.get("transient"):
                    raise
                pause = self._uniform() * min(self._longest_pause, self._first_pause * 2 ** (attempt - 1))
                logger.warning("attempt %d of %d, next in %.2f s: %s", attempt, self._attempts, pause, error)
                self._sleep(pause)
        return operation()


class _RetryingReader(FileReader):
    def __init__(self, store: RetryingStore, reader: FileReader) -> None:
        super().__init__(reader.name, reader.size)
        self._store = store
        self._reader = reader

    def expect_ascending(self) -> None:
        self._reader.expect_ascending()

    def close(self) -> None:
        self._reader.close()

    def _fill(self, offset: int, buffers: list[memoryview]) -> None:
        self._store.persist(lambda: self._reader.read_at(offset, buffers))
