# SPDX-License-Identifier: Apache-2.0
"""A store in the bucket of an object store: S3 and what speaks its protocol, GCS, Azure; through `obstore`.

Objects are durable when the service has acknowledged them, and appear whole, so there is nothing to flush.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Final, cast

import obstore
from obstore.exceptions import BaseError
from obstore.store import from_url

from shardckpt.errors import AlreadyExists, ConfigError, MissingFile, StoreError
from shardckpt.store.base import Entry, FileReader, FileWriter, Store, check_name, name_problem
from shardckpt.store.buffers import scatter
from shardckpt.store.objecterror import explained, variables_of
from shardckpt.store.upload import ObjectWriter

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ClientConfig, RetryConfig
    from obstore.store import ObjectStore as Backend

PATIENCE: Final = 120.0
"""Seconds."""
_CONNECT_SECONDS: Final = 10.0
_RETRIES: Final = 6
_FROM_ENVIRONMENT: Final = (
    *("allow_http", "allow_invalid_certificates", "connect_timeout", "read_timeout", "timeout", "user_agent"),
    *("proxy_url", "proxy_excludes", "proxy_ca_certificate"),
)
_PAGE: Final = 1000
_PIECE: Final = 1 << 20


class ObjectStore(Store):
    """The objects under ``url``; settings and credentials come from the environment (``AWS_*``, ...).

    ``backend`` replaces what the URL and the environment say. ``patience``: after how many seconds a request that was not
    answered, the part of an upload say, is given up; the library sends it again until then.
    """

    def __init__(self, url: str, backend: Backend | None = None, *, patience: float = PATIENCE) -> None:
        self.url = url.rstrip("/")
        self._backend = backend if backend is not None else _connect(url, patience)

    def create(self, name: str, size: int) -> FileWriter:
        check_name(name)
        try:
            self._head(name)
        except MissingFile:
            return ObjectWriter(self._backend, self.url, name, size)
        raise AlreadyExists(
            f"cannot create {name!r} in {self.url}: it exists, and is never overwritten: use another step or root",
            name=name,
        )

    def replace(self, name: str, size: int) -> FileWriter:
        return ObjectWriter(self._backend, self.url, check_name(name), size, replaces=True)

    def open(self, name: str) -> FileReader:
        check_name(name)
        size, tag = self._head(name)
        return _ObjectReader(self._backend, self.url, name, size, tag)

    def put_if_absent(self, name: str, data: bytes) -> None:
        check_name(name)
        try:
            with explained("publish", self.url, name, missing=StoreError):
                obstore.put(self._backend, name, data, mode="create")
        except StoreError as error:
            # A lost reply, then perhaps a retry inside the library: what failed, or is taken, may be our own.
            is_passing = bool(error.details.get("transient"))
            if (is_passing or isinstance(error, AlreadyExists)) and self._holds(name, data):
                return
            if is_passing:
                error.add("The service may still come to carry it out", outcome="unknown")
            raise

    def list(self, prefix: str = "") -> Sequence[Entry]:
        if prefix:
            check_name(prefix)
        with explained("list", self.url, prefix):
            found = [
                Entry(item["path"], item["size"], item["last_modified"].timestamp())
                for page in obstore.list(self._backend, prefix or None, chunk_size=_PAGE)
                for item in page
            ]
        return sorted((e for e in found if name_problem(e.name) is None), key=lambda e: e.name)

    def delete(self, name: str) -> None:
        check_name(name)
        with suppress(MissingFile), explained("delete", self.url, name):
            obstore.delete(self._backend, name)

    def _head(self, name: str) -> tuple[int, str | None]:
        with explained("open", self.url, name):
            found = obstore.head(self._backend, name)
        return found["size"], found["e_tag"]

    def _holds(self, name: str, data: bytes) -> bool:
        try:
            return self._head(name)[0] == len(data) and self.get(name, len(data)) == data
        except MissingFile:
            return False
        except StoreError as error:
            error.add("Whether it was published is not known", outcome="unknown")
            raise


class _ObjectReader(FileReader):
    def __init__(self, backend: Backend, url: str, name: str, size: int, tag: str | None) -> None:
        super().__init__(name, size)
        self._backend = backend
        self._url = url
        self._tag = tag

    def close(self) -> None:
        """Nothing is held between two reads."""

    def _fill(self, offset: int, buffers: list[memoryview]) -> None:
        wanted = sum(buffer.nbytes for buffer in buffers)
        if not wanted:
            return
        options: GetOptions = {"range": (offset, offset + wanted), "if_match": self._tag}
        got = first = 0
        with explained("read", self._url, self.name):
            for piece in obstore.get(self._backend, self.name, options=options).stream(_PIECE):
                got += len(piece)
                first = scatter(memoryview(piece), buffers, first)
        if got != wanted:
            raise self._truncated(offset, wanted, got)


def client_options(url: str, patience: float, environ: Mapping[str, str] = os.environ) -> ClientConfig:
    """What connections are made with. The environment counts more, as in ``AWS_ALLOW_HTTP``: the library itself looks there
    only when it is given no options at all."""
    found = {key: environ.get(f"{variables_of(url)}_{key.upper()}") for key in _FROM_ENVIRONMENT}
    ours = {
        "connect_timeout": timedelta(seconds=min(_CONNECT_SECONDS, patience / 3)),
        "timeout": timedelta(seconds=patience),
    }
    return cast("ClientConfig", {**ours, **{key: value for key, value in found.items() if value}})


def _connect(url: str, patience: float) -> Backend:
    retries: RetryConfig = {"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=patience)}
    try:
        return from_url(url, client_options=client_options(url, patience), retry_config=retries)
    except (BaseError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"{url!r} cannot be opened: {reason}; give it as s3://bucket/path, gs://bucket/path or "
            "az://container/path, with settings and credentials in AWS_*, GOOGLE_* or AZURE_* variables",
            url=url,
        ) from error
