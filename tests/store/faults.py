# SPDX-License-Identifier: Apache-2.0
"""A file system that fails, comes up short or dies when told to, and remembers what it was asked."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NoReturn

from shardckpt.store.filesystem import FileSystem

OPERATIONS: Final = frozenset(name for name in vars(FileSystem) if not name.startswith("_"))


class Killed(BaseException):
    """The process is gone: no handler of the code under test may stop it."""


Fault = Callable[..., Any]
"""Takes the place of one call: it is given the real operation and its arguments."""


def failing(code: int) -> Fault:
    """The call does nothing and fails with ``code``."""

    def fault(operation: Callable[..., Any], *args: Any) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return fault


def killing(operation: Callable[..., Any], *args: Any) -> None:
    """The process is killed before the call."""
    os.kill(os.getpid(), signal.SIGKILL)


def shortened(operation: Callable[..., Any], fd: int, data: Any, offset: int) -> Any:
    """A read or write stops half way; behind it a write leaves bytes that nobody has written."""
    if isinstance(data, memoryview):
        half = data.nbytes // 2
        page = mmap.mmap(-1, data.nbytes)
        page[:] = bytes(data[:half]) + b"\xee" * (data.nbytes - half)
        operation(fd, memoryview(page), offset)
        return half
    return operation(fd, [data[0][: -(-data[0].nbytes // 2)]], offset)


class FaultyFileSystem(FileSystem):
    """Real system calls, unless a fault was planned with one of the methods below.

    Only flushes do nothing: these tests cut no power, and a disk that others use takes its time for each.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._counts: Counter[str] = Counter()
        self._failures: dict[tuple[str, int], Callable[..., Any]] = {}
        self._always: dict[str, int] = {}
        self._strike: tuple[int, Fault, bool] | None = None
        self.struck = ""
        """The first call that `strike` met, with its path."""
        self.struck_at = 0
        """Its number."""
        self._short: int | None = None
        self._calls_left: int | None = None
        self._lock = threading.Lock()

    def fsync(self, fd: int) -> None:
        os.fstat(fd)

    def fail(self, operation: str, code: int, nth: int = 1) -> FaultyFileSystem:
        """Let the ``nth`` call of ``operation`` from now on fail with ``code`` and do nothing."""

        def fault(*args: Any) -> Any:
            raise OSError(code, os.strerror(code))

        return self.replace(operation, fault, nth)

    def fail_always(self, operation: str, code: int) -> FaultyFileSystem:
        self._always[operation] = code
        return self

    def replace(self, operation: str, fault: Callable[..., Any], nth: int = 1) -> FaultyFileSystem:
        self._failures[operation, self._counts[operation] + nth] = fault
        return self

    def strike(self, call: int, fault: Fault, *, lasting: bool = False) -> FaultyFileSystem:
        """Let call number ``call`` from now on, of whatever operation, be ``fault``; ``lasting``: and all that follow it."""
        self._strike, self.struck = (len(self.calls) + call, fault, lasting), ""
        return self

    def transfer_at_most(self, count: int) -> FaultyFileSystem:
        """Let reads and writes stop after ``count`` bytes."""
        self._short = count
        return self

    def die_after(self, calls: int) -> FaultyFileSystem:
        """Let the process be killed before call number ``calls`` + 1."""
        self._calls_left = calls
        return self

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def __getattribute__(self, name: str) -> Any:
        attribute = super().__getattribute__(name)
        return partial(self._call, name, attribute) if name in OPERATIONS else attribute

    def _call(self, name: str, operation: Callable[..., Any], *args: Any) -> Any:
        with self._lock:
            if self._calls_left is not None:
                if self._calls_left == 0:
                    raise Killed
                self._calls_left -= 1
            self.calls.append((name, args))
            self._counts[name] += 1
            fault = self._failures.get((name, self._counts[name]))
            strike = self._take_strike(name, args)
        if strike is not None:
            return strike(operation, *args)
        if name in self._always:
            raise OSError(self._always[name], os.strerror(self._always[name]))
        if fault is not None:
            return fault(*args)
        return operation(*self._shortened(name, args))

    def _take_strike(self, name: str, args: tuple[Any, ...]) -> Fault | None:
        if self._strike is None:
            return None
        call, fault, lasting = self._strike
        if len(self.calls) != call and not (lasting and len(self.calls) > call):
            return None
        where = args[0] if isinstance(args[0], str) else os.readlink(f"/proc/self/fd/{args[0]}")
        if not self.struck:
            self.struck, self.struck_at = f"{name} {where}", len(self.calls)
        return fault

    def _shortened(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._short is None or name not in ("pwrite", "preadv"):
            return args
        fd, data, offset = args
        if name == "pwrite":
            return fd, data[: self._short], offset
        return fd, [data[0][: self._short]], offset


class WithoutLinks(FaultyFileSystem):
    """A file system such as FAT, or some FUSE mounts."""

    def __init__(self, code: int = errno.EOPNOTSUPP) -> None:
        super().__init__()
        self.fail_always("link", code)


class Buffered(FaultyFileSystem):
    """A file system that does not take O_DIRECT."""

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return super().open(path, flags, mode)


def opened_flags(fs: FaultyFileSystem) -> Sequence[int]:
    return [args[1] for name, args in fs.calls if name == "open"]
