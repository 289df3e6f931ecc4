# SPDX-License-Identifier: Apache-2.0
"""A small key-value store over TCP, for processes that must not load torch, which takes seconds and more than 100 MB.

It has those methods of ``torch.distributed.TCPStore`` that the engine calls, with their meaning. A message is its length (4
bytes, little endian) and msgpack: a request ``[method, arguments]``, or the answer to it. Whoever can reach the port may use
the store, as with TCPStore.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import socket
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, TypeAlias

import msgspec

_HEAD_BYTES = 4
_LARGEST_REQUEST = 64 << 20
"""Bytes; more can only be noise from somebody who speaks another language."""
_BACKLOG = 4096
"""Ranks that may call in the same moment; the system has a limit of its own."""

_Request: TypeAlias = tuple[str, list[Any]]


class ConnectionLost(RuntimeError):
    """The store is gone, or was never there. A `RuntimeError`, as torch raises for its stores."""


class NotInTime(RuntimeError):
    """A key was not there in time."""


class KeyServer:
    """A store in this process, served by one thread until `close`."""

    def __init__(self) -> None:
        """Raises `OSError` when there is no port to listen on."""
        self._values: dict[str, bytes] = {}
        self._waiting: dict[str, list[_Waiter]] = {}
        self._handlers: set[asyncio.Task[None]] = set()
        self._socket = listen()
        self.port: int = self._socket.getsockname()[1]
        """Where it listens, on all interfaces."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),), daemon=True)
        self._stopped = asyncio.Event()
        self._thread.start()

    def close(self) -> None:
        """Stop, and hang up on everybody. A second call does nothing."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join()
            self._loop.close()

    async def _run(self) -> None:
        server = await asyncio.start_server(self._welcome, sock=self._socket)
        await self._stopped.wait()
        server.close()
        for handler in self._handlers:
            handler.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handler = asyncio.current_task()
        assert handler is not None
        self._handlers.add(handler)
        # hangs up on who leaves, on who sends nonsense, and on everybody at the end
        try:
            with contextlib.suppress(OSError, EOFError, ValueError, TypeError, asyncio.CancelledError):
                while True:
                    answer = await self._answer(await _receive(reader))
                    writer.write(_frame(answer))
                    await writer.drain()
        finally:
            self._handlers.discard(handler)
            writer.close()

    async def _answer(self, request: _Request) -> object:
        method, arguments = request
        found: object = getattr(self, f"_on_{method}")(*arguments) if method in _METHODS else None
        return await found if isinstance(found, Coroutine) else found

    def _on_set(self, key: str, value: bytes) -> None:
        self._values[key] = value
        for waiter in self._waiting.pop(key, ()):
            waiter.came(key)

    def _on_multi_set(self, keys: list[str], values: list[bytes]) -> None:
        for key, value in zip(keys, values, strict=True):
            self._on_set(key, value)

    async def _on_multi_get(self, keys: list[str]) -> list[bytes]:
        while not self._on_check(keys):
            await self._on_wait(keys, None)
        return [self._values[key] for key in keys]

    def _on_check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def _on_add(self, key: str, amount: int) -> int:
        total = int(self._values.get(key, b"0")) + amount
        self._on_set(key, str(total).encode())
        return total

    def _on_compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        current = self._values.get(key, b"")
        if current == expected:
            self._on_set(key, desired)
            return desired
        return current

    def _on_delete_key(self, key: str) -> bool:
        return self._values.pop(key, None) is not None

    async def _on_wait(self, keys: list[str], seconds: float | None) -> bool:
        waiter = _Waiter({key for key in keys if key not in self._values})
        for key in waiter.missing:
            self._waiting.setdefault(key, []).append(waiter)
        if waiter.missing:
            try:
                await asyncio.wait_for(waiter.complete.wait(), seconds)
            except (TimeoutError, asyncio.TimeoutError):
                return False
            finally:
                self._forget(waiter)
        return True

    def _forget(self, waiter: _Waiter) -> None:
        for key in waiter.missing:
            others = [other for other in self._waiting.pop(key, ()) if other is not waiter]
            if others:
                self._waiting[key] = others


_METHODS = frozenset(name.removeprefix("_on_") for name in vars(KeyServer) if name.startswith("_on_"))


class _Waiter:
    """Somebody who waits for keys."""

    def __init__(self, missing: set[str]) -> None:
        self.missing = missing
        self.complete = asyncio.Event()

    def came(self, key: str) -> None:
        self.missing.discard(key)
        if not self.missing:
            self.complete.set()


class KeyClient:
    """A connection to a store, until nobody refers to it; one thread at a time may use it.

    All methods raise `ConnectionLost`.
    """

    def __init__(self, host: str, port: int, timeout: float) -> None:
        """Connect; raises `ConnectionLost` when there is no store within ``timeout`` seconds."""
        try:
            self._socket = socket.create_connection((host, port), timeout)
            self._socket.settimeout(None)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # a host that is gone says nothing
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        except OSError as error:
            raise ConnectionLost(f"no store at {host}:{port}: {error}") from error

    def set(self, key: str, value: bytes | str) -> None:
        """Store bytes, or a text as UTF-8, under a key."""
        self._ask("set", key, _encoded(value))

    def multi_set(self, keys: Sequence[str], values: Sequence[bytes | str]) -> None:
        """Store one value under each key."""
        self._ask("multi_set", keys, [_encoded(value) for value in values])

    def get(self, key: str) -> bytes:
        """The value of a key, when it is there."""
        return self.multi_get([key])[0]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """The values of keys, when all are there."""
        values: list[bytes] = self._ask("multi_get", keys)
        return values

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys are there."""
        return bool(self._ask("check", keys))

    def add(self, key: str, amount: int) -> int:
        """Add to a number, which is 0 before, and return it."""
        return int(self._ask("add", key, amount))

    def compare_set(self, key: str, expected: bytes | str, desired: bytes | str) -> bytes:
        """Store ``desired`` if the value, which is empty before, is ``expected``; returns what is stored now."""
        value: bytes = self._ask("compare_set", key, _encoded(expected), _encoded(desired))
        return value

    def delete_key(self, key: str) -> bool:
        """Delete a key; whether it was there."""
        return bool(self._ask("delete_key", key))

    def wait(self, keys: Sequence[str], timeout: datetime.timedelta) -> None:
        """Return when all keys are there; raises `NotInTime`."""
        if not self._ask("wait", keys, timeout.total_seconds()):
            raise NotInTime(f"not there within {timeout}: {list(keys[:4])}")

    def _ask(self, method: str, *arguments: object) -> Any:
        try:
            self._socket.sendall(_frame((method, arguments)))
            size = int.from_bytes(self._read(_HEAD_BYTES), "little")
            return msgspec.msgpack.decode(self._read(size))
        except OSError as error:
            raise ConnectionLost(f"lost the connection to the store: {error}") from error

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            some = self._socket.recv(min(size - len(data), 1 << 20))
            if not some:
                raise ConnectionResetError("it was closed at the other end")
            data += some
        return bytes(data)


def listen() -> socket.socket:
    """A socket that listens on a free port of all interfaces. Raises `OSError` when there is none."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)
    return socket.create_server(("", 0), backlog=_BACKLOG)


def _encoded(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else value


def _frame(message: object) -> bytes:
    data = msgspec.msgpack.encode(message)
    return len(data).to_bytes(_HEAD_BYTES, "little") + data


async def _receive(reader: asyncio.StreamReader) -> _Request:
    size = int.from_bytes(await reader.readexactly(_HEAD_BYTES), "little")
    if size > _LARGEST_REQUEST:
        raise ValueError(f"a message of {size} bytes")
    request: _Request = msgspec.msgpack.decode(await reader.readexactly(size), type=_Request)
    return request
