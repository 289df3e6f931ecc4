# SPDX-License-Identifier: Apache-2.0
"""Names are given out once, with links and without."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from shardckpt.errors import AlreadyExists, StoreError
from shardckpt.store import LocalStore
from shardckpt.store.publish import Publisher
from tests.store.faults import FaultyFileSystem, WithoutLinks
from tests.store.helpers import in_threads, names


class Time:
    """A clock that only a sleep moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_without_links_a_name_is_claimed(tmp_path: Path, code: int) -> None:
    store = LocalStore(tmp_path, WithoutLinks(code))
    store.put_if_absent("step-1/manifest.json", b"first")
    with pytest.raises(AlreadyExists, match="never overwritten"):
        store.put_if_absent("step-1/manifest.json", b"second")
    assert store.get("step-1/manifest.json", 10) == b"first"
    assert names(store) == ["step-1/manifest.json"]


def test_one_of_many_racing_claims_wins(tmp_path: Path) -> None:
    def put(i: int) -> bool:
        try:
            LocalStore(tmp_path, WithoutLinks()).put_if_absent("step-1/manifest.json", f"attempt {i}".encode())
        except AlreadyExists:
            return False
        return True

    won = in_threads(12, put)
    store = LocalStore(tmp_path)
    assert won.count(True) == 1
    assert store.get("step-1/manifest.json", 100) == f"attempt {won.index(True)}".encode()
    assert names(store) == ["step-1/manifest.json"]


def test_a_stale_claim_is_reported_with_the_file_to_remove(tmp_path: Path) -> None:
    claim = tmp_path / "step-1" / "manifest.json.claim.tmp"
    claim.parent.mkdir()
    claim.touch()
    fs, time = WithoutLinks(), Time()
    store = LocalStore(tmp_path, fs, Publisher(fs, patience=5, clock=time.clock, sleep=time.sleep))
    with pytest.raises(StoreError, match=f"more than 5 s.* remove '{claim}' and save again"):
        store.put_if_absent("step-1/manifest.json", b"data")
    assert 5 <= time.now < 6
    assert names(store) == ["step-1/manifest.json.claim.tmp"]
    claim.unlink()
    store.put_if_absent("step-1/manifest.json", b"data")


def test_a_stale_claim_on_a_published_name_changes_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, WithoutLinks())
    store.put_if_absent("manifest.json", b"first")
    (tmp_path / "manifest.json.claim.tmp").touch()
    with pytest.raises(AlreadyExists):
        store.put_if_absent("manifest.json", b"second")


def test_waiting_for_a_claim_ends_when_its_owner_publishes(tmp_path: Path) -> None:
    claim = tmp_path / "manifest.json.claim.tmp"
    claim.touch()

    def publish_meanwhile(seconds: float) -> None:
        (tmp_path / "manifest.json").write_bytes(b"theirs")

    fs = WithoutLinks()
    store = LocalStore(tmp_path, fs, Publisher(fs, sleep=publish_meanwhile))
    with pytest.raises(AlreadyExists):
        store.put_if_absent("manifest.json", b"ours")


def test_waiting_for_a_claim_ends_when_its_owner_gives_up(tmp_path: Path) -> None:
    claim = tmp_path / "manifest.json.claim.tmp"
    claim.touch()
    fs = WithoutLinks()
    store = LocalStore(tmp_path, fs, Publisher(fs, sleep=lambda _: claim.unlink()))
    store.put_if_absent("manifest.json", b"ours")
    assert store.get("manifest.json", 10) == b"ours"


def test_a_failed_rename_gives_the_claim_back(tmp_path: Path) -> None:
    fs = WithoutLinks().fail("rename", errno.EIO)
    store = LocalStore(tmp_path, fs)
    with pytest.raises(StoreError, match="EIO"):
        store.put_if_absent("manifest.json", b"data")
    assert names(store) == []


def test_a_link_whose_reply_was_lost_is_recognised(tmp_path: Path) -> None:
    def link_and_forget(source: str, target: str) -> None:
        os.link(source, target)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    store = LocalStore(tmp_path, FaultyFileSystem().replace("link", link_and_forget))
    store.put_if_absent("manifest.json", b"data")
    assert store.get("manifest.json", 10) == b"data"
    assert names(store) == ["manifest.json"]
