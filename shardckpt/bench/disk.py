# SPDX-License-Identifier: Apache-2.0
"""The page cache and the file system under a benchmark."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import sys
import tempfile
from pathlib import Path

from ..store.mounts import mount_of

_DROP_CACHES = "/proc/sys/vm/drop_caches"
_READ_BYTES = 4 << 20
O_DIRECT: int = getattr(os, "O_DIRECT", 0)
ALIGNMENT = 4096
"""Bytes; offsets, lengths and addresses of direct input and output are multiples of it."""


def files_under(folder: str) -> list[str]:
    """Paths of all files under ``folder``, sorted."""
    return sorted(str(path) for path in Path(folder).rglob("*") if path.is_file())


def empty(folder: str) -> None:
    """Remove everything in ``folder``, and wait until the file system has done so: some free blocks later, at a cost."""
    for path in Path(folder).iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    os.sync()


def drop_from_cache(folder: str) -> str:
    """Make the next read of the files under ``folder`` go to the disk; returns by which means.

    Emptying the whole page cache hurts everybody else on the machine, so that is done only when pages are left otherwise, and
    only where it is allowed. What is left nevertheless, on tmpfs everything, is said as well.
    """
    paths = files_under(folder)
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    means = "posix_fadvise"
    if any(map(cached_pages, paths)) and os.access(_DROP_CACHES, os.W_OK):
        Path(_DROP_CACHES).write_text("1")
        means = "posix_fadvise and drop_caches"
    left = sum(map(cached_pages, paths))
    return f"{means}, which left {left} pages there" if left else means


def cached_pages(path: str) -> int:
    """Pages of a file that are in the page cache; 0 where the system does not tell."""
    size = os.stat(path).st_size
    if not size or not sys.platform.startswith("linux"):
        return 0
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        # mincore tells of the page cache, and reads nothing
        start = ctypes.c_char.from_buffer(view)
        failed = ctypes.CDLL(None, use_errno=True).mincore(ctypes.byref(start), ctypes.c_size_t(size), pages)
        del start
        if failed:
            raise OSError(ctypes.get_errno(), f"mincore: {os.strerror(ctypes.get_errno())}", path)
        return sum(page & 1 for page in bytes(pages))


def read_into_cache(folder: str) -> None:
    """Make the next read of the files under ``folder`` find them in the page cache."""
    buffer = memoryview(mmap.mmap(-1, _READ_BYTES))
    for path in files_under(folder):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def takes_direct(folder: str) -> bool:
    """Whether the file system of ``folder`` takes O_DIRECT."""
    if not O_DIRECT:
        return False
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        try:
            fd = os.open(os.path.join(scratch, "probe"), os.O_WRONLY | os.O_CREAT | O_DIRECT, 0o600)
            try:
                os.pwrite(fd, mmap.mmap(-1, ALIGNMENT), 0)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return False
            raise
    return True


def file_system_of(folder: str) -> tuple[str, str]:
    """(type, device) of the file system that ``folder`` is on; empty where the system does not say."""
    mount = mount_of(folder)
    return ("", "") if mount is None else (mount.kind, mount.device)


def bytes_read_by_process() -> int:
    """Bytes that this process has asked the system to read, from whatever; 0 where the system does not count."""
    try:
        text = Path("/proc/self/io").read_text()
    except OSError:
        return 0
    return int(text.split("rchar:")[1].split()[0])
