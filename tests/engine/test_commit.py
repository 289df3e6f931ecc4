# SPDX-License-Identifier: Apache-2.0
"""Commit: a manifest appears once, whole, and only over files that are there; what is not known is not called done."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest

from shardckpt.commit import check_visible, publish
from shardckpt.errors import AlreadyCommitted, AlreadyExists, CheckpointError, NotShared, StorageFull, StoreError
from shardckpt.layout import Mesh, MeshLayout, Shard
from shardckpt.manifest import MANIFEST_NAME
from shardckpt.plan import Plan
from shardckpt.store import Entry, MemoryStore
from shardckpt.validate import parse_manifest
from tests.engine.simulate import ATTEMPT, by_hand, invented_receipts, manifest_of, random_tensors, write_files

PREFIX = "step-00000007/"
NAME = PREFIX + MANIFEST_NAME
OTHER = "feedfeedfeedfeed"
_numbers = itertools.count()


def a_plan() -> Plan:
    return by_hand(2, {"x": ("float32", MeshLayout((40,), Mesh((0, 1), (2,)), (Shard(0),)), (0, 1))})


def a_manifest(attempt: str = ATTEMPT) -> bytes:
    plan = by_hand(1, {})
    return manifest_of(plan, invented_receipts(plan, attempt), attempt)


class Network(MemoryStore):
    """Loses what ``put_if_absent`` answers: before or after it took effect, with an error of one's choice."""

    def __init__(self) -> None:
        super().__init__(f"commit-{next(_numbers)}")
        self.before: CheckpointError | None = None
        self.after: CheckpointError | None = None
        self.get_error: CheckpointError | None = None

    def put_if_absent(self, name: str, data: bytes) -> None:
        if self.before is not None:
            raise self.before
        super().put_if_absent(name, data)
        if self.after is not None:
            raise self.after

    def get(self, name: str, limit: int) -> bytes:
        if self.get_error is not None:
            raise self.get_error
        return super().get(name, limit)


@pytest.fixture
def store() -> Network:
    return Network()


def test_a_manifest_is_published_once(store: Network) -> None:
    publish(store, PREFIX, a_manifest(), ATTEMPT)
    committed = store.get(NAME, 1 << 20)
    with pytest.raises(AlreadyCommitted, match="Nothing was changed: save another step, or remove that one first") as caught:
        publish(store, PREFIX, a_manifest(OTHER), OTHER)
    assert caught.value.prefix == PREFIX
    assert store.get(NAME, 1 << 20) == committed


def test_of_racing_writers_one_wins(store: Network) -> None:
    attempts = [f"{number:016x}" for number in range(8)]
    manifests = {attempt: a_manifest(attempt) for attempt in attempts}

    def race(attempt: str) -> bool:
        try:
            publish(store, PREFIX, manifests[attempt], attempt)
        except AlreadyCommitted:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        won = [attempt for attempt, ok in zip(attempts, threads.map(race, attempts), strict=True) if ok]
    assert [parse_manifest(store.get(NAME, 1 << 20)).manifest.attempt] == won


def test_a_refusal_after_ones_own_success_is_success(store: Network) -> None:
    """An object store may carry out a put, lose the reply, and refuse the retry with 412."""
    store.after = AlreadyExists("412", name=NAME)
    publish(store, PREFIX, a_manifest(), ATTEMPT)


def test_a_refusal_before_anything_happened_is_an_error_as_it_is(store: Network) -> None:
    store.before = StorageFull("no space")
    with pytest.raises(StorageFull) as caught:
        publish(store, PREFIX, a_manifest(), ATTEMPT)
    assert caught.value.details.get("outcome") is None


@pytest.mark.parametrize("can_look", [True, False])
def test_an_outcome_that_is_not_known_is_said_to_be_so(store: Network, can_look: bool) -> None:
    """The manifest is there, but nobody said that it is durable: files must stay, and success must not be reported."""
    store.after = StoreError("connection reset")
    store.get_error = None if can_look else StoreError("connection refused")
    with pytest.raises(StoreError, match=r"not known whether the commit is durable: connection reset.*verify") as caught:
        publish(store, PREFIX, a_manifest(), ATTEMPT)
    assert caught.value.outcome == "unknown"


def test_a_manifest_of_another_that_cannot_be_read_is_not_ones_own(store: Network) -> None:
    store.put_if_absent(NAME, b"garbage")
    with pytest.raises(CheckpointError, match="invalid manifest"):
        publish(store, PREFIX, a_manifest(), ATTEMPT)
    assert store.get(NAME, 100) == b"garbage"


def test_files_have_to_be_seen_with_their_sizes(store: Network) -> None:
    plan = a_plan()
    receipts = write_files(store, plan, random_tensors(plan), PREFIX)
    check_visible(store, PREFIX, receipts)
    store.delete(receipts[1].name)
    with pytest.raises(NotShared, match=r"rank 0 does not see the files that rank 1 \(b\) wrote.*all ranks share") as caught:
        check_visible(store, PREFIX, receipts, ["a", "b"])
    assert caught.value.ranks == [1]
    store.put_if_absent(receipts[1].name, b"short")
    with pytest.raises(NotShared, match=r"files that rank 1 wrote"):
        check_visible(store, PREFIX, receipts)


class OldListing(MemoryStore):
    """A host that remembers a listing from before anything was written."""

    def list(self, prefix: str = "") -> list[Entry]:
        return []


def test_a_listing_that_is_late_does_no_harm() -> None:
    store = OldListing("late-listing")
    plan = a_plan()
    receipts = write_files(store, plan, random_tensors(plan), PREFIX)
    check_visible(store, PREFIX, receipts)
    store.delete(receipts[0].name)
    with pytest.raises(NotShared, match="files that rank 0 wrote"):
        check_visible(store, PREFIX, receipts)


def test_files_of_other_steps_do_not_count(store: Network) -> None:
    plan = a_plan()
    receipts = write_files(store, plan, random_tensors(plan), "step-00000001/")
    with pytest.raises(StoreError, match=r"files that ranks 0, 1 wrote"):
        check_visible(store, PREFIX, receipts)
