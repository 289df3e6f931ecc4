# SPDX-License-Identifier: Apache-2.0
"""An HTTP proxy in front of the S3 server, for the ways in which networks and services fail."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_ERROR_BODY = b'<?xml version="1.0"?><Error><Code>InternalError</Code><Message>We failed.</Message></Error>'


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens to requests of one method, instead of a plain reply."""

    method: str
    status: int | None = None
    """Answer with this status and an S3 error as body; None breaks the connection."""
    forward: bool = False
    """Let the server do its work first: only the reply is lost."""
    cut: bool = False
    """Send half of the server's reply, then break the connection."""
    query: str = ""
    """Only requests whose query has this text."""


@dataclass(slots=True)
class Proxy:
    """A running proxy. Each fault in ``faults`` happens once, in order, to the first request that it fits."""

    url: str
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take_fault(self, method: str, query: str) -> Fault | None:
        with self._lock:
            self.requests.append(f"{method} {query}")
            for fault in self.faults:
                if fault.method == method and fault.query in query:
                    self.faults.remove(fault)
                    return fault
        return None


@contextmanager
def running_proxy(endpoint: str) -> Iterator[Proxy]:
    """A proxy before ``endpoint`` on a free port of 127.0.0.1, until the block is left."""

    class Handler(_Handler):
        server_address = urlsplit(endpoint).netloc
        one_at_a_time = threading.Lock()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        proxy = Proxy(f"http://127.0.0.1:{server.server_port}")
        Handler.proxy = proxy
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy
    server_address: str
    one_at_a_time: threading.Lock

    def _relay(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if len(body) < length:
            # the client has given it up, and the server would wait for the rest while all others wait for the server
            self.close_connection = True
            return
        fault = self.proxy.take_fault(self.command, urlsplit(self.path).query)
        if fault is None or fault.forward or fault.cut:
            status, headers, reply = self._forward(body)
        if fault is None:
            self._answer(status, headers, reply)
        elif fault.cut:
            self._answer(status, headers, reply, send=len(reply) // 2)
            self._break()
        elif fault.status is None:
            self._break()
        else:
            self._answer(fault.status, {"Content-Type": "application/xml"}, _ERROR_BODY)

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.server_address, timeout=20)
        try:
            # the server keeps its uploads in what several threads at once make it stumble over, and answers with status 500
            with self.one_at_a_time:
                connection.request(self.command, self.path, body, dict(self.headers))
                reply = connection.getresponse()
                return reply.status, dict(reply.getheaders()), reply.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes, send: int | None = None) -> None:
        self.send_response_only(status)
        # A reply to HEAD has no body, and tells the length that the body of a GET would have.
        headers.setdefault("Content-Length", str(len(body)))
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:send])

    def _break(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:
        """Tests are quiet."""

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _relay
