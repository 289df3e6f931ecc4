# SPDX-License-Identifier: Apache-2.0
"""Rank 0 commits, and loses the store of the ranks before it has told anybody: what is committed stays whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from shardckpt.commit import draft_manifest
from shardckpt.coordinate import Coordinator
from shardckpt.errors import CheckpointError, CoordinationError, RankTimeout, StoreError
from shardckpt.events import Timings
from shardckpt.feed import chunk_size
from shardckpt.finish import Job, finish_save
from shardckpt.header import safetensors_header
from shardckpt.keystore import ConnectionLost, KeyClient, KeyServer
from shardckpt.layout import Mesh, MeshLayout, Shard
from shardckpt.live import LiveSource
from shardckpt.maintain.verify import verify
from shardckpt.manifest import MANIFEST_NAME, manifest_digest
from shardckpt.parity.layout import parity_record_name
from shardckpt.plan import Plan
from shardckpt.protect import Committed, protect
from shardckpt.stage import FileData, FileMap
from shardckpt.store import MemoryStore
from tests.engine.pairs import PATIENCE, Dial, on_two_ranks
from tests.engine.simulate import ATTEMPT, by_hand, contents, local_tensors, random_tensors, save
from tests.store.helpers import names

PREFIX = "step-00000007/"
_numbers = itertools.count()


class CutBehind(KeyClient):
    """Rank 0's connection to the store of the ranks, which is gone for all when there is ``file`` to tell of."""

    def __init__(self, server: KeyServer, store: MemoryStore, file: str) -> None:
        super().__init__("localhost", server.port, PATIENCE)
        self._server = server
        self._files = store
        self._file = file

    def set(self, key: str, value: bytes | str) -> None:
        if key.endswith("/verdict") and self._file in names(self._files):
            self._server.close()
            raise ConnectionLost("it is cut")
        super().set(key, value)


def cut_behind(store: MemoryStore, file: str) -> Dial:
    """How rank 0 connects."""
    return lambda server: CutBehind(server, store, file)


def a_plan() -> Plan:
    return by_hand(2, {"x": ("float32", MeshLayout((40_001, 3), Mesh((0, 1), (2,)), (Shard(0),)), (0, 1))})


class LostReply(MemoryStore):
    """A store that publishes the manifest, and does not say so."""

    def put_if_absent(self, name: str, data: bytes) -> None:
        super().put_if_absent(name, data)
        if name.endswith(MANIFEST_NAME):
            raise StoreError("the reply is lost")


def a_save(store: MemoryStore) -> Callable[[Coordinator], None]:
    """What each rank does to save step 7."""
    plan = a_plan()
    wholes = random_tensors(plan)

    def part(coordinator: Coordinator) -> None:
        rank = coordinator.rank
        pieces = plan.file_pieces(rank)
        data = FileData(FileMap(pieces), local_tensors(plan, rank, wholes))
        job = Job(
            prefix=PREFIX,
            step=7,
            attempt=ATTEMPT,
            header=safetensors_header(pieces),
            block_size=plan.block_size,
            draft=draft_manifest(plan, contents()) if rank == 0 else None,
        )
        source = LiveSource(data, chunk_size(plan.block_size), 1, dict)
        finish_save(job, source, store, coordinator, workers=1, timings=Timings())

    return part


@pytest.mark.parametrize(("kind", "error"), [(MemoryStore, CoordinationError), (LostReply, StoreError)])
def test_a_checkpoint_that_nobody_was_told_of_stays_whole(kind: type[MemoryStore], error: type[CheckpointError]) -> None:
    store = kind(f"untold-{next(_numbers)}")
    told, other = on_two_ranks(a_save(store), cut_behind(store, f"{PREFIX}{MANIFEST_NAME}"))
    assert type(told) is error
    assert told.outcome == "unknown"
    assert isinstance(other, RankTimeout)
    assert other.ranks == [0]
    (found,) = verify(store, read_data=True)
    assert found.ok


class Late(MemoryStore):
    """An object store whose service carries out the publication of a manifest when it has been given up."""

    held: tuple[str, bytes] | None = None

    def put_if_absent(self, name: str, data: bytes) -> None:
        if name.endswith(MANIFEST_NAME):
            self.held = name, data
            raise StoreError("no reply", transient=True, outcome="unknown")
        super().put_if_absent(name, data)

    def carry_out(self) -> None:
        """Do it now."""
        assert self.held is not None
        super().put_if_absent(*self.held)


def test_a_commit_that_comes_when_it_was_given_up_is_whole() -> None:
    store = Late(f"late-{next(_numbers)}")
    errors = on_two_ranks(a_save(store))
    assert [error.outcome for error in errors if error is not None] == ["unknown"] * 2
    store.carry_out()
    (found,) = verify(store, read_data=True)
    assert found.ok


@pytest.mark.parametrize("name", ["plain", "not-UTF-8-\udcff"])
def test_that_a_commit_is_uncertain_is_told_to_all(name: str) -> None:
    """An error is told to the other ranks without what cannot be sent, such as the name of a directory, and with all else."""
    store = LostReply(f"{name}-{next(_numbers)}")
    errors = on_two_ranks(a_save(store))
    assert [type(error) for error in errors] == [StoreError, StoreError]
    assert [error.outcome for error in errors if error is not None] == ["unknown"] * 2
    (found,) = verify(store, read_data=True)
    assert found.ok


def test_a_parity_that_nobody_was_told_of_stays_whole() -> None:
    store = MemoryStore(f"untold-{next(_numbers)}")
    plan = a_plan()
    digest = manifest_digest(save(store, plan, PREFIX).manifest)
    record = f"{PREFIX}{parity_record_name(ATTEMPT)}"

    def part(coordinator: Coordinator) -> None:
        protect(coordinator, store, Committed(PREFIX, ATTEMPT, digest), 2, workers=1)

    assert on_two_ranks(part, cut_behind(store, record)) == [None, None]
    (found,) = verify(store, read_data=True)
    assert found.ok
    store.delete(next(name for name in names(store) if "/rank-00001-" in name))
    (found,) = verify(store, read_data=True)
    assert [problem.kind for problem in found.problems] == ["MissingFile"]
