# SPDX-License-Identifier: Apache-2.0
"""Gives a finished local file its final name, if and only if that name is free.

``link`` does that in one step. File systems without hard links get a *claim*: whoever makes
``<name>.claim.tmp`` with O_EXCL alone may rename the file to its final name, and removes the claim
afterwards. Whether the name is taken is decided under the claim, so a claim that a killed process left behind
is harmless once the name exists, and blocks it otherwise: then nobody can tell whether its owner is dead or
only slow, and a person has to remove it, or a later start of the run does (`shardckpt.fencing`).
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from shardckpt.errors import AlreadyExists, StoreError
from shardckpt.store.base import TEMPORARY_SUFFIX
from shardckpt.store.filesystem import FileSystem
from shardckpt.store.oserror import explained

NEW_FILE_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

NO_LINKS: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
"""What file systems without hard links answer to one."""
_POLL_SECONDS: Final = 0.02


def claim_of(path: str) -> str:
    """Name of the claim to a path."""
    return f"{path}.claim{TEMPORARY_SUFFIX}"


class Publisher:
    """Publishes files on one file system, waiting ``patience`` seconds at most for the claim of another writer."""

    def __init__(
        self,
        fs: FileSystem,
        *,
        patience: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._fs = fs
        self._patience = patience
        self._clock = clock
        self._sleep = sleep

    def publish(self, temporary: str, path: str) -> None:
        """Give the file ``temporary`` the name ``path``, or raise `AlreadyExists`. Flushes nothing."""
        with explained("publish", path):
            try:
                self._fs.link(temporary, path)
            except FileExistsError:
                if not self._is_same_file(temporary, path):
                    raise
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                self._publish_under_claim(temporary, path)

    def _is_same_file(self, temporary: str, path: str) -> bool:
        # NFS repeats a request whose reply was lost, and then reports that the link, our own, exists.
        return os.path.samestat(self._fs.lstat(temporary), self._fs.lstat(path))

    def _publish_under_claim(self, temporary: str, path: str) -> None:
        claim = claim_of(path)
        self._take(claim, path)
        try:
            self._require_free(path)
            self._fs.rename(temporary, path)
        finally:
            with suppress(FileNotFoundError):
                self._fs.unlink(claim)

    def _take(self, claim: str, path: str) -> None:
        deadline = self._clock() + self._patience
        while True:
            self._require_free(path)
            try:
                self._fs.close(self._fs.open(claim, NEW_FILE_FLAGS))
                return
            except FileExistsError as error:
                if self._clock() >= deadline:
                    raise StoreError(
                        f"cannot publish {path!r}: another writer has claimed the name for more than {self._patience:g} "
                        f"s; when no other save is running, its process died: remove {claim!r} and save again",
                        path=path,
                        claim=claim,
                    ) from error
            self._sleep(_POLL_SECONDS)

    def _require_free(self, path: str) -> None:
        try:
            self._fs.lstat(path)
        except FileNotFoundError:
            return
        raise AlreadyExists(f"cannot publish {path!r}: it exists, and is never overwritten", path=path)
