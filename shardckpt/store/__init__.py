# SPDX-License-Identifier: Apache-2.0
"""Where checkpoints are kept. `open_store` turns a path or URL into a `Store`; `base.py` is the contract."""

from __future__ import annotations

import os
from urllib.parse import unquote, urlsplit

from shardckpt.errors import ConfigError
from shardckpt.store.base import ALIGNMENT, Entry, FileReader, FileWriter, Store, check_name, is_temporary
from shardckpt.store.local import LocalStore
from shardckpt.store.memory import MemoryStore

__all__ = [
    "ALIGNMENT",
    "Entry",
    "FileReader",
    "FileWriter",
    "LocalStore",
    "MemoryStore",
    "Store",
    "check_name",
    "is_temporary",
    "open_store",
]


def open_store(url: str | os.PathLike[str]) -> Store:
    """The store at a path, ``file://path`` or ``memory://name``.

    Touches nothing yet. Raises `ConfigError` for anything else.
    """
    location = os.fspath(url)
    scheme, separator, rest = location.partition("://")
    if not separator:
        return _local(location, location)
    if scheme == "file":
        return _local(location, _path_of_file_url(location))
    if scheme == "memory" and rest:
        return MemoryStore(rest)
    raise ConfigError(
        f"{location!r} is not a place for checkpoints; take a path, file:///path or memory://name",
        url=location,
    )


def _local(location: str, path: str) -> LocalStore:
    if not path or "\0" in path:
        raise ConfigError(f"{location!r} does not name a directory", url=location)
    return LocalStore(os.path.expanduser(path))


def _path_of_file_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ConfigError(
            f"{url!r} names the host {parts.netloc!r}; file URLs have three slashes, as file:///ckpts/run42",
            url=url,
        )
    return unquote(parts.path)
