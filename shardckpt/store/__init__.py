# SPDX-License-Identifier: Apache-2.0
"""Where checkpoints are kept. `open_store` turns a path or URL into a `Store`; `base.py` is the contract."""

from __future__ import annotations

import os
import re
from typing import Final
from urllib.parse import unquote, urlsplit

from shardckpt.errors import ConfigError
from shardckpt.store.base import ALIGNMENT, Entry, FileReader, FileWriter, Store, check_name, is_temporary
from shardckpt.store.local import LocalStore
from shardckpt.store.memory import MemoryStore
from shardckpt.store.retry import RetryingStore

__all__ = [
    "ALIGNMENT",
    "Entry",
    "FileReader",
    "FileWriter",
    "LocalStore",
    "MemoryStore",
    "RetryingStore",
    "Store",
    "check_name",
    "is_temporary",
    "open_store",
]

_CLOUD: Final = ("s3", "gs", "az")
_CUT_URL: Final = re.compile(r"(file|memory|https?|s3|gs|az):/", re.ASCII)


def open_store(url: str | os.PathLike[str]) -> Store:
    """The store at a path, ``file:///path``, ``memory://name``, or an ``s3://``, ``gs://`` or ``az://`` URL.

    Touches nothing yet. Raises `ConfigError` for anything else.
    """
    location = _text(url)
    scheme, separator, rest = location.partition("://")
    if not separator:
        if _CUT_URL.match(location):
            raise ConfigError(f"{location!r} has one slash where a URL has two: pathlib takes one away, so give it as a str")
        return _local(location, location)
    if scheme == "file":
        return _local(location, _path_of_file_url(location))
    if scheme == "memory" and rest:
        return MemoryStore(rest)
    if scheme in _CLOUD and rest:
        return _cloud(location)
    raise ConfigError(
        f"{location!r} is not a place for checkpoints; take a path, file:///path, memory://name, "
        "s3://bucket/path, gs://bucket/path or az://container/path",
        url=location,
    )


def _text(url: object) -> str:
    location = os.fspath(url) if isinstance(url, os.PathLike) else url
    if not isinstance(location, str):
        raise ConfigError(
            f"a {type(url).__name__} is not a place for checkpoints; take a path or a URL, as in '/ckpts/run42', and give it "
            "first, before the state"
        )
    return location


def _local(location: str, path: str) -> LocalStore:
    if not path or "\0" in path:
        raise ConfigError(f"{location!r} does not name a directory", url=location)
    return LocalStore(os.path.expanduser(path))


def _cloud(url: str) -> Store:
    try:
        from shardckpt.store.object import ObjectStore
    except ModuleNotFoundError as error:
        if error.name != "obstore":
            raise
        raise ConfigError(
            f"{url!r} needs the package obstore, which is not installed: pip install 'shardckpt[cloud]'",
            url=url,
        ) from error
    return RetryingStore(ObjectStore(url))


def _path_of_file_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ConfigError(
            f"{url!r} names the host {parts.netloc!r}; file URLs have three slashes, as file:///ckpts/run42",
            url=url,
        )
    return unquote(parts.path)
