# SPDX-License-Identifier: Apache-2.0
"""Paths and URLs lead to the right store; everything else is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardckpt.errors import ConfigError
from shardckpt.store import LocalStore, MemoryStore, RetryingStore, open_store


@pytest.mark.parametrize("location", ["/ckpts/run 42", "file:///ckpts/run%2042", "file://localhost/ckpts/run%2042"])
def test_paths(location: str) -> None:
    store = open_store(location)
    assert isinstance(store, LocalStore)
    assert store.url == "/ckpts/run 42"


def test_path_objects_relative_paths_and_homes() -> None:
    assert open_store(Path("/ckpts")).url == "/ckpts"
    assert open_store("ckpts").url == str(Path.cwd() / "ckpts")
    assert open_store("~/ckpts").url == str(Path.home() / "ckpts")


def test_the_url_of_a_store_opens_it_again() -> None:
    for location in ("/ckpts/run42", "memory://run42"):
        assert open_store(open_store(location).url).url == open_store(location).url


def test_memory() -> None:
    store = open_store("memory://run42")
    assert isinstance(store, MemoryStore)
    assert store.url == "memory://run42"


@pytest.mark.parametrize("url", ["s3://bucket/run", "gs://bucket/run/"])
def test_clouds_are_tried_again(url: str) -> None:
    pytest.importorskip("obstore", reason="object stores are not tested: obstore is not installed")
    store = open_store(url)
    assert isinstance(store, RetryingStore)
    assert store.url == url.rstrip("/")


@pytest.mark.parametrize("location", ["", "ftp://host/path", "memory://", "s3://", "file://host/path", "file://", "a\0b"])
def test_other_places_are_refused(location: str) -> None:
    with pytest.raises(ConfigError):
        open_store(location)
