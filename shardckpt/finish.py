# SPDX-License-Identifier: Apache-2.0
"""Finish a save whose plan is made: write this rank's file, hand in the receipt, commit.

Blocking saves do so in the caller's thread, others in a background thread or process; there is no other way to a checkpoint.
"""

from __future__ import annotations

import logging
from time import perf_counter

import msgspec

from .commit import build_manifest, check_visible, publish
from .coordinate import Coordinator
from .errors import AlreadyCommitted, CheckpointError, MissingFile, RankTimeout, StoreError
from .events import Phase, Timings
from .feed import Samples, Source
from .fencing import Fence, clear_outdated, require_current
from .manifest import Manifest, MetricsRecord, manifest_digest, rank_file_name
from .metrics import encode_columns
from .readback import Verify, read_back
from .replicas import condense, find_diverging, raise_divergence
from .store import Store
from .write import Receipt, write_rank_file

logger = logging.getLogger("shardckpt")
_PACK = msgspec.msgpack.Encoder()


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's part of a save, apart from the bytes of tensors: plain data, which another process can carry out."""

    prefix: str
    """Where the checkpoint goes: "" or ``step-.../``."""
    step: int
    """Number of the training step."""
    attempt: str
    """Random hex id of this attempt at the save."""
    header: bytes
    """Of this rank's file."""
    block_size: int
    """Bytes per digest."""
    draft: Manifest | None
    """On rank 0: the manifest, without what is known only when the files are written."""
    verify: Verify | None = None
    """What to look at before this rank says that its file is durable."""
    fence: Fence | None = None
    """On rank 0: keeps the save from being committed when a newer start of the run has begun."""


class _Written(msgspec.Struct):
    receipt: Receipt
    condensed: dict[str, bytes]
    seconds: dict[Phase, float]


class _Verdict(msgspec.Struct):
    digest: str
    diverging: tuple[str, ...]


def finish_save(job: Job, source: Source, store: Store, coordinator: Coordinator, *, workers: int, timings: Timings) -> str:
    """Write, collect receipts, commit; the SHA-256 of the manifest. Collective.

    On any rank's error every rank removes what it wrote of the attempt, and raises.
    """
    name = f"{job.prefix}{rank_file_name(coordinator.rank, job.attempt)}"
    samples: list[Samples] = []
    written_at: list[float] = []

    def write() -> bytes:
        receipt = write_rank_file(store, name, job.header, source, job.block_size, workers=workers, timings=timings)
        if job.verify == "readback":
            read_back(store, receipt, job.header, job.block_size, workers=workers, timings=timings)
        samples.append(source.samples())
        written_at.append(perf_counter())
        return _PACK.encode(_Written(receipt, condense(samples[0]), {**source.seconds, **timings.seconds}))

    def commit(payloads: list[bytes]) -> bytes:
        timings.add("receipts", perf_counter() - written_at[0])
        written = [msgspec.msgpack.decode(payload, type=_Written) for payload in payloads]
        diverging = find_diverging([w.condensed for w in written])
        if diverging:
            return _PACK.encode(_Verdict("", diverging))
        with timings.measure("commit"):
            seconds = [written[0].seconds | timings.seconds, *(w.seconds for w in written[1:])]
            receipts = [w.receipt for w in written]
            check_visible(store, job.prefix, receipts, coordinator.hosts)
            digest = _commit(job, store, receipts, encode_columns(seconds))
        return _PACK.encode(_Verdict(digest, ()))

    try:
        verdict = msgspec.msgpack.decode(coordinator.round("save: write", write, commit), type=_Verdict)
        if coordinator.rank != 0:
            timings.add("receipts", perf_counter() - written_at[0])
        if verdict.diverging:
            raise_divergence(coordinator, samples[0], verdict.diverging[0])
    except BaseException as error:
        if is_surely_uncommitted(error):
            remove_quietly(store, name)
        raise
    return verdict.digest


def _commit(job: Job, store: Store, receipts: list[Receipt], metrics: MetricsRecord | None) -> str:
    assert job.draft is not None
    data = build_manifest(job.draft, receipts, metrics)
    if job.fence is None:
        publish(store, job.prefix, data, job.attempt)
    else:
        _publish_fenced(job, job.fence, store, data)
    return manifest_digest(data)


def _publish_fenced(job: Job, fence: Fence, store: Store, data: bytes) -> None:
    def allow() -> None:
        require_current(store, fence, job.step, published=False)

    try:
        try:
            publish(store, job.prefix, data, job.attempt, allow)
        except AlreadyCommitted:
            if not clear_outdated(store, fence, job.step):
                raise
            publish(store, job.prefix, data, job.attempt, allow)
    except MissingFile:
        # a newer start has revoked it
        allow()
        raise
    require_current(store, fence, job.step, published=True)


def is_surely_uncommitted(error: BaseException) -> bool:
    """Whether files of the attempt may be removed: not when rank 0, which alone commits, may have gone ahead."""
    if isinstance(error, RankTimeout) and 0 in error.details.get("ranks", [0]):
        return False
    return isinstance(error, CheckpointError) and error.details.get("outcome") != "unknown"


def remove_quietly(store: Store, name: str) -> None:
    """Remove a file that nobody is going to refer to; when that fails, it is logged."""
    try:
        store.delete(name)
    except StoreError as error:
        logger.warning("could not remove %s of a failed save (prune will): %s", name, error)
