# SPDX-License-Identifier: Apache-2.0
"""Commit: rank 0 proves that the rank files are all there and fit the plan, then publishes the manifest.

Write order, which is an invariant: rank files and their directory are durable before any receipt is sent; all receipts are
in before the manifest is written; the manifest appears whole, durable and only where there was none. So a manifest that
exists means a checkpoint that is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import msgspec

from ._version import __version__
from .checksum import encode_digests
from .errors import (
    AlreadyCommitted,
    AlreadyExists,
    CheckpointError,
    DigestRefused,
    MissingFile,
    NotACheckpointRoot,
    NotShared,
    StoreError,
)
from .manifest import (
    FORMAT,
    MANIFEST_LIMIT,
    MANIFEST_NAME,
    VERSION,
    FileRecord,
    Manifest,
    MetricsRecord,
    TensorRecord,
    encode_manifest,
    manifest_digest,
)
from .plan import Plan
from .records import LayoutEncoder
from .store import Store
from .validate import parse_manifest
from .wire import name_ranks
from .write import Receipt


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a manifest says apart from tensors and files."""

    step: int
    """Number of the training step."""
    attempt: str
    """Random hex id of this attempt at the save."""
    objects: Mapping[str, Any]
    """Encoded replicated values by name."""
    containers: Mapping[str, Any]
    """Encoded container records by name."""
    metadata: Mapping[str, Any]
    """The user's own JSON mapping."""
    torch: str
    """Version of torch."""


def draft_manifest(plan: Plan, contents: Contents) -> Manifest:
    """The manifest as far as it is known before anything is written: without files, metrics and time."""
    encoder = LayoutEncoder()
    tensors = {name: TensorRecord(alias=canonical) for name, canonical in plan.aliases.items()}
    for tensor in plan.tensors:
        record = encoder.encode(tensor.dtype, tensor.layout, value=tensor.is_value)
        if tensor.writers != (0, 1):
            record = TensorRecord(record.dtype, record.shape, layout=record.layout, writers=tensor.writers)
        tensors[tensor.name] = record
    return Manifest(
        format=FORMAT,
        version=VERSION,
        attempt=contents.attempt,
        step=contents.step,
        created="",
        world_size=plan.world_size,
        block_size=plan.block_size,
        meshes=encoder.meshes,
        layouts=encoder.layouts,
        tensors=tensors,
        objects=dict(contents.objects),
        containers=dict(contents.containers),
        files=(),
        torch=contents.torch,
        shardckpt=__version__,
        metadata=dict(contents.metadata),
        checksum="",
    )


def build_manifest(draft: Manifest, receipts: Sequence[Receipt], metrics: MetricsRecord | None = None) -> bytes:
    """The manifest of a plan that was carried out; raises `InvalidManifest` if the receipts do not fit the draft."""
    files = tuple(_file_record(rank, receipt) for rank, receipt in enumerate(receipts))
    created = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    data = encode_manifest(msgspec.structs.replace(draft, created=created, files=files, metrics=metrics))
    parse_manifest(data)
    return data


def _file_record(rank: int, receipt: Receipt) -> FileRecord:
    name = receipt.name.rpartition("/")[2]
    return FileRecord(rank, name, receipt.size, receipt.data, receipt.header, encode_digests(receipt.digests))


def check_visible(store: Store, prefix: str, receipts: Sequence[Receipt], hosts: Sequence[str] = ()) -> None:
    """Raise `NotShared` unless rank 0 sees every rank's file with its full size; ``hosts`` is by rank.

    By one listing; what that does not show is opened, as a host may remember an older listing (NFS does so for up to a minute),
    and nothing of a name that nobody there has asked for. Names carry the attempt, so no file of another one is meant.
    """
    sizes = {entry.name: entry.size for entry in store.list(prefix.rstrip("/"))}
    unlisted = [rank for rank, receipt in enumerate(receipts) if sizes.get(receipt.name) != receipt.size]
    unseen = [rank for rank in unlisted if not _is_there(store, prefix, receipts[rank])]
    if unseen:
        raise NotShared(
            f"rank 0 does not see the files that {name_ranks(unseen, hosts)} wrote, for example {receipts[unseen[0]].name}, in "
            f"{store.url}: the directory is not shared between the hosts, so nothing is committed. Save to a file system that "
            "all ranks share, mounted at this place on each host, or to an object store",
            ranks=unseen,
        )


def _is_there(store: Store, prefix: str, receipt: Receipt) -> bool:
    try:
        # where the manifest will say that it is
        with store.open(f"{prefix}{receipt.name.rpartition('/')[2]}") as reader:
            return reader.size == receipt.size
    except MissingFile:
        return False


def publish(store: Store, prefix: str, data: bytes, attempt: str, allow: Callable[[], None] | None = None) -> None:
    """Make the manifest appear, if there is none yet and ``allow``, which is called as late as can be, does not raise.

    Raises `AlreadyCommitted` when another save has committed here, and `MissingFile` when it was revoked (`Store.revoke`).
    After a `StoreError` with the detail ``outcome="unknown"`` the manifest may exist; after any other error it does not.
    """
    name = f"{prefix}{MANIFEST_NAME}"
    try:
        if allow is None:
            store.put_if_absent(name, data)
        else:
            store.put_if_allowed(name, data, allow)
    except AlreadyExists as error:
        if _committed_attempt(store, name) != attempt:
            raise already_committed(store, prefix) from error
    except (StoreError, MissingFile) as error:
        try:
            there = _committed_attempt(store, name) == attempt
        except (MissingFile, NotACheckpointRoot):
            there = False
        except CheckpointError:
            there = True
        if there:
            raise StoreError(
                f"{name} in {store.url}: it is not known whether the commit is durable: {error}. "
                "The files were left in place; verify the checkpoint before use",
                outcome="unknown",
            ) from error
        raise


def find_committed(store: Store, prefix: str, attempt: str) -> str | None:
    """The SHA-256 of the manifest if ``attempt`` has committed here, for one who was not told. Raises `StoreError`.

    The commit is durable then: whoever made it may have died before it was.
    """
    name = f"{prefix}{MANIFEST_NAME}"
    try:
        data = store.get(name, MANIFEST_LIMIT)
    except MissingFile:
        return None
    if parse_manifest(data).manifest.attempt != attempt:
        return None
    store.make_durable(name)
    return manifest_digest(data)


def _committed_attempt(store: Store, name: str) -> str:
    return parse_manifest(store.get(name, MANIFEST_LIMIT)).manifest.attempt


def already_committed(store: Store, prefix: str) -> AlreadyCommitted:
    """The error for a place where a checkpoint is committed already."""
    return AlreadyCommitted(
        f"{store.url} already has a committed checkpoint at {prefix or 'its root'!r}. Nothing was changed: "
        "save another step, or remove that one first",
        prefix=prefix,
    )


def read_manifest_bytes(store: Store, prefix: str, expect_digest: str | None = None) -> bytes:
    """The bytes of a committed manifest, not yet checked; raises `MissingFile` when there is none.

    With ``expect_digest`` (SHA-256 in hex) any other manifest raises `DigestRefused`.
    """
    data = store.get(f"{prefix}{MANIFEST_NAME}", MANIFEST_LIMIT)
    if expect_digest is not None and manifest_digest(data) != expect_digest.lower():
        raise DigestRefused(
            f"the manifest of {store.url}/{prefix} has SHA-256 {manifest_digest(data)}, not the expected {expect_digest}: "
            "it is another checkpoint, or it was changed",
            expected=expect_digest,
            got=manifest_digest(data),
        )
    return data
