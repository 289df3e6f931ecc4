# SPDX-License-Identifier: Apache-2.0
"""The steps of a root: which are committed, how large they are, who saved them and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shardckpt.errors import CheckpointError, CheckpointNotFound
from shardckpt.manifest import MANIFEST_NAME, step_directory
from shardckpt.root import Root
from shardckpt.store import Entry, Store

from .stored import open_checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One checkpoint, or what may become one."""

    name: str
    """Directory in the root; ``.`` for a checkpoint that has the place to itself."""
    step: int | None
    """Number of the training step; None when only the manifest could tell, and does not."""
    state: Literal["committed", "incomplete", "damaged"]
    """Incomplete: without a manifest, so it is being saved, or its save did not finish. Damaged: see ``problem``."""
    world_size: int | None
    """Ranks that saved it; None when it is not known."""
    files: int
    """Files that are there, the manifest included."""
    bytes: int
    """Their size."""
    created: str | None
    """When it was saved: ISO 8601, UTC; None when it is not known."""
    modified: float
    """When the newest file was written: seconds since the epoch, by the clock of the storage."""
    problem: str | None = None
    """What is wrong as far as a listing and the manifest tell; `verify` tells more."""


def list_steps(store: Store) -> list[Listed]:
    """All steps of the root, by number; or the one checkpoint that is there. Reads manifests and no data.

    Raises `CheckpointNotFound` when there is neither, and `StoreError`.
    """
    found = [_look_at(store, f"{step_directory(f.step)}/", f.step, f.entries) for f in Root(store).scan()]
    if not found:
        entries = [entry for entry in store.list() if "/" not in entry.name]
        if not any(entry.name == MANIFEST_NAME for entry in entries):
            raise CheckpointNotFound(f"there is no checkpoint in {store.url}", url=store.url)
        found = [_look_at(store, "", None, entries)]
    return found


def _look_at(store: Store, prefix: str, step: int | None, entries: Sequence[Entry]) -> Listed:
    state: Literal["committed", "incomplete", "damaged"] = "incomplete"
    world_size, created, problem = None, None, None
    if any(entry.name == f"{prefix}{MANIFEST_NAME}" for entry in entries):
        try:
            manifest = open_checkpoint(store, prefix).checkpoint.manifest
            world_size, created = manifest.world_size, manifest.created
            step = manifest.step if step is None else step
            there = {entry.name: entry.size for entry in entries}
            problem = _missing([file.name for file in manifest.files if there.get(f"{prefix}{file.name}") != file.size])
        except CheckpointError as error:
            problem = error.message
        state = "damaged" if problem else "committed"
    return Listed(
        name=prefix.rstrip("/") or ".",
        step=step,
        state=state,
        world_size=world_size,
        files=len(entries),
        bytes=sum(entry.size for entry in entries),
        created=created,
        modified=max(entry.modified for entry in entries),
        problem=problem,
    )


def _missing(names: Sequence[str]) -> str | None:
    if not names:
        return None
    return f"{names[0]}{f' and {len(names) - 1} more files are' if len(names) > 1 else ' is'} missing or not of full size"
