# SPDX-License-Identifier: Apache-2.0
"""Protect a committed checkpoint: write parities of its rank files, then a record of them that appears whole or not at all.

Each rank takes a part of the files of its group, from the memory of those who wrote them or else from storage, verifies it, and
writes its XOR. The checkpoint is complete and durable before, whatever becomes of this.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from .commit import read_manifest_bytes
from .coordinate import Coordinator
from .errors import CheckpointError, StoreError
from .feed import Source
from .finish import is_surely_uncommitted, remove_quietly
from .manifest import FileRecord
from .neighbors import Neighbors
from .parity.layout import cut_parity, group_ranks, parity_file_name, parity_record_name
from .parity.record import build_parity, member_body
from .parity.xor import Others, write_slice
from .store import Store
from .validate import parse_manifest

logger = logging.getLogger("shardckpt")
_PACK = msgspec.msgpack.Encoder()


@dataclass(frozen=True, slots=True)
class Committed:
    """A checkpoint that this job has just committed."""

    prefix: str
    """Where it is: "" or ``step-.../``."""
    attempt: str
    """Random hex id of the attempt that has committed it."""
    digest: str
    """SHA-256 of its manifest, in hex."""


class _Files(msgspec.Struct):
    """What each rank needs to know of the manifest, which its digest has proved."""

    block_size: int
    files: tuple[FileRecord, ...]


class _Slice(msgspec.Struct):
    size: int
    digests: bytes


def protect(
    coordinator: Coordinator,
    store: Store,
    committed: Committed,
    group_size: int,
    *,
    workers: int,
    source: Source | None = None,
) -> None:
    """Write the parity of groups of at most ``group_size`` ranks. Collective; takes at most 64 MiB of memory.

    ``source`` is what this rank has written, if it is still there and stays as it is: then storage is not read for it.
    When it fails, all ranks log why, and remove what they have written.
    """
    groups = group_ranks(coordinator.hosts, group_size)
    written: list[str] = []

    def write() -> bytes:
        found = _write(coordinator.rank, store, committed, groups, workers, written, neighbors)
        return _PACK.encode(found)

    def commit(payloads: list[bytes]) -> bytes:
        slices = [msgspec.msgpack.decode(payload, type=_Slice) for payload in payloads]
        _publish(store, committed, groups, slices)
        return b""

    try:
        with Neighbors(coordinator, committed.attempt, source) as neighbors:
            coordinator.round("save: parity", write, commit, name=_round_name(committed.attempt))
    except Exception as error:
        if is_surely_uncommitted(error):
            for name in written:
                remove_quietly(store, name)
        where = f"{store.url}/{committed.prefix}".rstrip("/")
        logger.warning("%s is saved and durable, but has no parity: %s: %s", where, type(error).__name__, error)


def give_up(coordinator: Coordinator, attempt: str, error: CheckpointError) -> None:
    """Tell the other ranks, in place of a process that has died, that this one writes no parity."""

    def fail() -> bytes:
        raise error

    with contextlib.suppress(CheckpointError):
        coordinator.round("save: parity", fail, name=_round_name(attempt))


def _round_name(attempt: str) -> str:
    # A rank that was not told that the save is committed takes no part, and must not be out of step from then on.
    return f"parity-{attempt}"


def _write(
    rank: int,
    store: Store,
    committed: Committed,
    groups: Sequence[Sequence[int]],
    workers: int,
    written: list[str],
    neighbors: Neighbors,
) -> _Slice:
    """Write this rank's slice of its group's parity; its name goes into ``written`` when it is durable."""
    data = read_manifest_bytes(store, committed.prefix, committed.digest)
    manifest = msgspec.json.decode(data, type=_Files)
    number, group = next((number, group) for number, group in enumerate(groups) if rank in group)
    members, at = [manifest.files[member] for member in group], group.index(rank)
    cuts = cut_parity([file.size - file.data for file in members], manifest.block_size)
    if at >= len(cuts):
        return _Slice(0, b"")
    start, stop = cuts[at]
    name = f"{committed.prefix}{parity_file_name(number, at, committed.attempt)}"
    bodies = [member_body(committed.prefix, file) for file in members]
    images = neighbors.images(dict(zip(group, (body.name for body in bodies), strict=True)))
    with Others(store, bodies, manifest.block_size, images) as others, store.create(name, stop - start) as writer:
        digests = write_slice(writer, start, others, manifest.block_size, workers)
    written.append(name)
    return _Slice(stop - start, digests)


def _publish(store: Store, committed: Committed, groups: Sequence[Sequence[int]], slices: Sequence[_Slice]) -> None:
    # Read again, because a prune may have removed the checkpoint meanwhile: no record is left in an empty place.
    checkpoint = parse_manifest(read_manifest_bytes(store, committed.prefix, committed.digest))
    files = [[(slices[rank].size, slices[rank].digests) for rank in group if slices[rank].size] for group in groups]
    data = build_parity(checkpoint, groups, files)
    name = f"{committed.prefix}{parity_record_name(committed.attempt)}"
    try:
        store.put_if_absent(name, data)
    except StoreError as error:
        error.details["outcome"] = "unknown"
        raise
    nbytes = sum(found.size for found in slices)
    logger.info("protected %s/%s: %.3f GB of parity in %d groups", store.url, committed.prefix, nbytes / 1e9, len(groups))
