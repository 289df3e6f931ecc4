# SPDX-License-Identifier: Apache-2.0
"""Committed checkpoints as upkeep works on them: found by path, opened without looking at their data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shardckpt.manifest import MANIFEST_LIMIT, MANIFEST_NAME, step_directory
from shardckpt.root import Root, find_checkpoint
from shardckpt.store import Store
from shardckpt.validate import Checkpoint, parse_manifest

Progress = Callable[[int, int], None]
"""Told (bytes done, bytes in all) now and then, on the thread that called."""

WORKERS = 4
"""Threads that read and verify; each has one buffer of 4 to 16 MiB."""


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A checkpoint whose manifest holds together."""

    store: Store
    """Where it is."""
    prefix: str
    """What its names start with: "" or "step-.../"."""
    checkpoint: Checkpoint
    """The manifest, and the plan that follows from it."""

    @property
    def url(self) -> str:
        """Names it in messages; `shardckpt.load` takes it."""
        return f"{self.store.url}/{self.prefix}".rstrip("/")


def open_checkpoint(store: Store, prefix: str | None = None) -> StoredCheckpoint:
    """The checkpoint at ``prefix``; without one, the store's own checkpoint or its newest committed step.

    Raises `CheckpointNotFound` when there is none, `MissingFile` and `InvalidManifest`.
    """
    if prefix is None:
        prefix = find_checkpoint(store)
    return StoredCheckpoint(store, prefix, parse_manifest(store.get(f"{prefix}{MANIFEST_NAME}", MANIFEST_LIMIT)))


def committed_prefixes(store: Store) -> list[str]:
    """Prefixes of all committed checkpoints in a store, by step; `CheckpointNotFound` when there is none."""
    newest = find_checkpoint(store)
    return [f"{step_directory(step)}/" for step in Root(store).steps()] if newest else [newest]


def no_progress(done: int, total: int) -> None:
    """Tell nobody."""
