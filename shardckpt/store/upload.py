# SPDX-License-Identifier: Apache-2.0
"""Writes one object from chunks that arrive in any order, as a multipart upload in the background.

The parts of an upload are sent in order, so a chunk that comes early waits in memory. The memory taken is at
most `WINDOW` bytes of waiting chunks (or one chunk, when that is larger) and `CONCURRENCY` + 1 parts under
way. When the window is full, `write_at` waits for the upload; chunks should therefore be written in about
ascending order.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import obstore

from shardckpt.errors import CheckpointError, MissingFile, StoreError
from shardckpt.store.base import FileWriter
from shardckpt.store.objecterror import explained

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Backend

logger = logging.getLogger("shardckpt")

WINDOW: Final = 32 << 20
"""Bytes that may wait for the chunks before them."""
CONCURRENCY: Final = 4
"""Parts of one object that are sent at the same time."""
_PART: Final = 8 << 20
_MOST_PARTS: Final = 10_000


class _Aborted(Exception):
    """Makes the library cancel the upload that reads from us; no caller sees it."""


class ObjectWriter(FileWriter):
    """Uploads to ``name`` of ``backend``; the object appears, whole, at `finish`.

    A process that is killed leaves parts behind, which no listing shows: give the bucket a lifecycle rule
    that removes incomplete multipart uploads.
    """

    def __init__(
        self, backend: Backend, url: str, name: str, size: int, patience: float = 600.0, *, replaces: bool = False
    ) -> None:
        """With ``replaces``, there may be an object of that name, which stays unless a new one is there whole."""
        super().__init__(name, size)
        self._replaces = replaces
        self._backend = backend
        self._url = url
        self._patience = patience
        self._changed = threading.Condition()
        self._waiting: dict[int, bytes] = {}
        self._waiting_bytes = 0
        self._next = 0
        self._ending: str | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._upload, name=f"upload {name}", daemon=True)
        self._thread.start()

    def _write(self, offset: int, buffer: memoryview) -> None:
        chunk = bytes(buffer[: self.size - offset])
        with self._changed:
            self._wait_for_room(offset, len(chunk))
            self._waiting[offset] = chunk
            self._waiting_bytes += len(chunk)
            self._changed.notify_all()

    def _wait_for_room(self, offset: int, length: int) -> None:
        while not self._may_go_on(offset, length):
            before = self._next
            if not self._changed.wait(self._patience) and self._next == before:
                raise StoreError(
                    f"the upload of {self.name!r} to {self._url} made no progress for {self._patience:g} s: it "
                    f"waits for offset {before}, which the network does not take or which was not written",
                    name=self.name,
                    offset=before,
                )
        self._raise_error()
        if self._ending is not None:
            raise StoreError(f"{self.name!r} was aborted while it was written", name=self.name)

    def _may_go_on(self, offset: int, length: int) -> bool:
        # The chunk that the upload waits for is always let in: without it nothing would move.
        fits = self._waiting_bytes + length <= WINDOW or offset == self._next
        return fits or self._error is not None or self._ending is not None

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _finish(self) -> None:
        self._end("finish")
        self._raise_error()
        with explained("check", self._url, self.name):
            stored = obstore.head(self._backend, self.name)["size"]
        if stored != self.size:
            raise StoreError(
                f"{self.name!r} in {self._url} has {stored} bytes after an upload of {self.size}: the store lost "
                "data or another writer used the name",
                name=self.name,
                wanted=self.size,
                got=stored,
            )

    def _abort(self) -> None:
        may_exist = self._ending is not None and not self._replaces
        self._end("abort")
        if may_exist:
            try:
                with explained("delete", self._url, self.name):
                    obstore.delete(self._backend, self.name)
            except MissingFile:
                pass
            except CheckpointError as error:
                logger.warning("the unfinished object %r may be left in %s: %s", self.name, self._url, error)

    def _end(self, how: str) -> None:
        with self._changed:
            self._ending = how
            self._changed.notify_all()
        self._thread.join()

    def _upload(self) -> None:
        part = max(_PART, -(-self.size // _MOST_PARTS))
        try:
            with explained("upload", self._url, self.name, missing=StoreError):
                obstore.put(
                    self._backend,
                    self.name,
                    self._chunks(),
                    use_multipart=self.size > part,
                    chunk_size=part,
                    max_concurrency=CONCURRENCY,
                )
        except _Aborted:
            pass
        except Exception as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _chunks(self) -> Iterator[bytes]:
        while self._next < self.size:
            yield self._take()
        with self._changed:
            # The object must not appear before `finish` asks for it.
            self._changed.wait_for(lambda: self._ending is not None)
            if self._ending == "abort":
                raise _Aborted

    def _take(self) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: self._next in self._waiting or self._ending == "abort")
            if self._ending == "abort":
                raise _Aborted
            chunk = self._waiting.pop(self._next)
            self._next += len(chunk)
            self._waiting_bytes -= len(chunk)
            self._changed.notify_all()
        return chunk
