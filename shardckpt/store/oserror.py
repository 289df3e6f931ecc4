# SPDX-License-Identifier: Apache-2.0
"""Turns ``OSError`` into errors that say which operation failed where, why, and what to do about it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from shardckpt.errors import (
    AlreadyExists,
    CheckpointError,
    MissingFile,
    NotACheckpointRoot,
    StorageFull,
    StoreError,
)

_KINDS: Final[dict[int, type[CheckpointError]]] = {
    errno.ENOSPC: StorageFull,
    errno.EDQUOT: StorageFull,
    errno.ENOTDIR: NotACheckpointRoot,
    errno.ENOENT: MissingFile,
    errno.EEXIST: AlreadyExists,
}

_ADVICE: Final = {
    errno.ENOSPC: "free space there, or prune older checkpoints",
    errno.EDQUOT: "free quota there, or prune older checkpoints",
    errno.ENOTDIR: "a part of this path is not a directory but a file, or a link to nothing: choose another root",
    errno.ENOENT: "it was deleted, never written, or the path is wrong",
    errno.EEXIST: "an existing file is never overwritten: use another step or root, or delete it first",
    errno.EACCES: "this user has no permission: check owner and mode of the path and of what is above it",
    errno.EPERM: "the system forbids it to this user: check owner, mode and attributes of the path",
    errno.EROFS: "the file system is mounted read-only: remount it or choose another root",
    errno.EIO: "the device or its network failed: look at the system log, and trust nothing that was under way",
    errno.EMFILE: "this process has too many open files: raise `ulimit -n`",
    errno.ENFILE: "the system has too many open files: raise fs.file-max",
    errno.ENAMETOOLONG: "choose a shorter root or name",
    errno.ELOOP: "it is a symbolic link, and only regular files are taken: put the file itself in its place",
    errno.ENXIO: "it is a socket or a device, and only regular files are taken: move it away",
    errno.EISDIR: "it is a directory where a file is needed: move it away",
    errno.ESTALE: "the network file system was exported or mounted anew: mount it again",
    errno.EFBIG: "the file system or `ulimit -f` does not allow files of this size",
}


def store_error(operation: str, path: str, error: OSError) -> CheckpointError:
    """The error to raise, from ``error``, when ``operation`` (a verb phrase) failed on ``path``."""
    number = error.errno or 0
    code = errno.errorcode.get(number, "unknown error")
    reason = os.strerror(number) if number else str(error)
    advice = _ADVICE.get(number, "the operating system gave no more detail than this")
    return _KINDS.get(number, StoreError)(
        f"cannot {operation} {path!r}: {reason} ({code}); {advice}",
        operation=operation,
        path=path,
        errno=code,
    )


@contextmanager
def explained(operation: str, path: str) -> Iterator[None]:
    """Raise `store_error` in place of any ``OSError`` of the block."""
    try:
        yield
    except OSError as error:
        raise store_error(operation, path, error) from error
