# SPDX-License-Identifier: Apache-2.0
"""Rank files out of the memory of the ranks that have just written them, so that storage need not give them back.

Each rank serves the data region of its own file over TCP until the parity is made. A caller begins with the secret of the one
that it calls, and then asks for one range after the other: its first byte and the one behind its last, 8 bytes each, little
endian. The answer is these bytes, and nothing else. They are trusted no more than those on a disk: digests decide.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator

from .feed import Source
from .keystore import listen

logger = logging.getLogger("shardckpt")

SECRET_BYTES = 16
_RANGE = struct.Struct("<QQ")
_PATIENCE = 15.0
"""Seconds for a connection, and for each range, which is a few MiB, however it trickles in."""


def cut(source: Source, start: int, stop: int) -> Iterator[memoryview]:
    """The bytes ``[start, stop)`` of a region, part by part; each is there until the next one is asked for."""
    for index in range(start // source.chunk, -(-stop // source.chunk)):
        first = index * source.chunk
        with source.take(index) as chunk:
            yield chunk.memory[max(start - first, 0) : min(stop - first, source.chunk)]


class OwnImage:
    """The region of this rank's file."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def read(self, start: int, stop: int, into: memoryview) -> bool:
        """Fill ``into`` with the bytes ``[start, stop)``; always True."""
        at = 0
        for part in cut(self._source, start, stop):
            into[at : at + len(part)] = part
            at += len(part)
        return True


class ImageServer:
    """Gives the region of this rank's file to all who know the secret, until `close`."""

    def __init__(self, source: Source, patience: float = _PATIENCE) -> None:
        """``patience``: seconds for a caller to say the secret, and to take a part.

        Raises `OSError` when there is no port to listen on, and `RuntimeError` when there can be no thread.
        """
        self._patience = patience
        self.secret = secrets.token_bytes(SECRET_BYTES)
        self._source = source
        self._socket = listen()
        self.port: int = self._socket.getsockname()[1]
        """Where it listens, on all interfaces."""
        self._lock = threading.Lock()
        self._callers: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._welcome, name="shardckpt-image", daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        """Hang up on everybody. Once."""
        # wakes the thread that waits for callers; after it, no more of them are let in
        self._socket.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._socket.close()
        with self._lock:
            for caller in self._callers:
                with contextlib.suppress(OSError):
                    caller.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()

    def _welcome(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self._socket.accept()
                thread = threading.Thread(target=self._serve, args=(caller,), name="shardckpt-image-caller", daemon=True)
                with self._lock:
                    self._callers.add(caller)
                try:
                    thread.start()
                except RuntimeError:
                    # no more threads may be started: the caller reads storage
                    self._hang_up(caller)
                else:
                    self._threads.append(thread)

    def _serve(self, caller: socket.socket) -> None:
        # hangs up on who leaves, on who says nonsense, on who does not take what it asked for, and on everybody at the end
        try:
            with contextlib.suppress(OSError, EOFError):
                if not hmac.compare_digest(_receive(caller, SECRET_BYTES, self._patience), self.secret):
                    return
                while True:
                    caller.settimeout(None)
                    start, stop = _RANGE.unpack(_receive(caller, _RANGE.size))
                    if not start <= stop <= self._source.nbytes:
                        return
                    caller.settimeout(self._patience)
                    for part in cut(self._source, start, stop):
                        caller.sendall(part)
        finally:
            self._hang_up(caller)

    def _hang_up(self, caller: socket.socket) -> None:
        with self._lock:
            self._callers.discard(caller)
        caller.close()


class PeerImage:
    """The region of another rank's file. Any thread may use it, each over a connection of its own."""

    def __init__(self, host: str, port: int, secret: bytes, patience: float = _PATIENCE) -> None:
        """``patience``: seconds for a connection, and for a range."""
        self._address = host, port
        self._patience = patience
        self._secret = secret
        self._lock = threading.Lock()
        self._idle: list[socket.socket] = []
        self._is_lost = False

    def read(self, start: int, stop: int, into: memoryview) -> bool:
        """Fill ``into`` with the bytes ``[start, stop)``; False when the rank does not give them, who is not asked again."""
        if self._is_lost:
            return False
        connection = None
        try:
            connection = self._connection()
            connection.sendall(_RANGE.pack(start, stop))
            _receive_into(connection, into, self._patience)
        except (OSError, EOFError, UnicodeError) as error:
            # the last one for a name that is none
            self._is_lost = True
            if connection is not None:
                connection.close()
            logger.info("the rank at %s:%s does not give its data, so storage is read: %s", *self._address, error)
            return False
        with self._lock:
            self._idle.append(connection)
        return True

    def close(self) -> None:
        """Hang up, when no thread reads."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def _connection(self) -> socket.socket:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        connection = socket.create_connection(self._address, self._patience)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(self._secret)
        except OSError:
            connection.close()
            raise
        return connection


def _receive(connection: socket.socket, size: int, patience: float | None = None) -> bytes:
    data = bytearray(size)
    _receive_into(connection, memoryview(data), patience)
    return bytes(data)


def _receive_into(connection: socket.socket, into: memoryview, patience: float | None) -> None:
    deadline = None if patience is None else time.monotonic() + patience
    while into:
        if deadline is not None:
            # zero would mean not to wait at all
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
        count = connection.recv_into(into)
        if not count:
            raise EOFError("the connection was closed at the other end")
        into = into[count:]
