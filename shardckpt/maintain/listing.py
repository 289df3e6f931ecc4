# SPDX-License-Identifier: Apache-2.0
"""The steps of a root: which are committed, under way or failed, how large they are, who saved them and when."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from shardckpt.errors import CheckpointError, CheckpointNotFound
from shardckpt.failed_restores import FailedRestores
from shardckpt.journal import Journal, JournalEntry, outdated
from shardckpt.manifest import MANIFEST_NAME, step_directory
from shardckpt.root import Root, StepFiles, commit_times
from shardckpt.store import Entry, Store

from .stored import open_checkpoint

_MOST_LOOKS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One checkpoint, or what may become one."""

    name: str
    """Directory in the root, which need not be there yet; ``.`` for a checkpoint that has the place to itself."""
    step: int | None
    """Number of the training step; None when only the manifest could tell, and does not."""
    state: Literal["committed", "damaged", "requested", "staged", "failed", "incomplete"]
    """Requested, staged: its save is under way. Failed, damaged: see ``problem``. Incomplete: it has no manifest, and its save
    has not told of itself, or has not finished for so long that it must have been killed."""
    world_size: int | None
    """Ranks that saved it; None when it is not known."""
    files: int
    """Files that are there, the manifest included."""
    bytes: int
    """Their size."""
    created: str | None
    """When it was saved: ISO 8601, UTC; None when it is not known."""
    modified: float
    """When the newest file was written, the journal included: seconds since the epoch, by the clock of the storage."""
    problem: str | None = None
    """What is wrong as far as a listing, the manifest, the journal and earlier restores tell; `verify` tells more."""


def list_steps(store: Store, clock: Callable[[], float] = time.time) -> list[Listed]:
    """All steps of the root, by number; or the one checkpoint that is there. Reads manifests and the journal, but no data.

    Raises `CheckpointNotFound` when there is neither, and `StoreError`.
    """
    for _ in range(_MOST_LOOKS):
        found, gone = _list_once(store, clock)
        if not gone:
            break
    if not found:
        entries = [entry for entry in store.list() if "/" not in entry.name]
        if not any(entry.name == MANIFEST_NAME for entry in entries):
            raise CheckpointNotFound(f"there is no checkpoint in {store.url}", url=store.url)
        found = [_look_at(store, "", None, entries, {})]
    return found


def _list_once(store: Store, clock: Callable[[], float]) -> tuple[list[Listed], bool]:
    """All steps; and whether some of them were removed meanwhile, so that newer ones may be there by now."""
    # The journal first: a save that ends in between has its manifest by the time of the scan.
    journal = Journal(store).entries()
    scanned = Root(store).scan()
    files = {of_step.step: of_step.entries for of_step in scanned}
    over = outdated(journal, commit_times(scanned), clock())
    ended = {entry.step: entry for entry in over if entry.step in files}
    telling = {entry.step: entry for entry in journal if entry not in over}
    failed_restores = FailedRestores(store)
    reasons: dict[tuple[int | None, str], str]
    reasons = {(failed.step, failed.digest): failed_restores.reason(failed) for failed in failed_restores.entries()}
    found, gone = [], False
    for step in sorted({*files, *telling}):
        listed = _look_until_still(store, step, files.get(step, ()), reasons)
        gone |= step in files and not listed.files
        if listed.files or step in telling:
            found.append(listed if listed.state != "incomplete" else _ask_journal(listed, telling.get(step), ended.get(step)))
    return found, gone


def _look_until_still(
    store: Store, step: int, entries: Sequence[Entry], reasons: Mapping[tuple[int | None, str], str]
) -> Listed:
    """What is there of a step. One that seems to be damaged may be one that is being removed or saved."""
    for _ in range(_MOST_LOOKS):
        listed = _look_at(store, f"{step_directory(step)}/", step, entries, reasons)
        if listed.state != "damaged":
            break
        before, entries = tuple(entries), Root(store).look_at(step).entries
        if entries == before:
            break
    if listed.state == "incomplete" and StepFiles(step, tuple(entries)).removals():
        return replace(listed, problem="it was being removed, and that was not finished; prune does that")
    return listed


def _look_at(
    store: Store, prefix: str, step: int | None, entries: Sequence[Entry], reasons: Mapping[tuple[int | None, str], str]
) -> Listed:
    state: Literal["committed", "incomplete", "damaged"] = "incomplete"
    world_size, created, problem = None, None, None
    if any(entry.name == f"{prefix}{MANIFEST_NAME}" for entry in entries):
        try:
            checkpoint = open_checkpoint(store, prefix).checkpoint
            manifest, failed = checkpoint.manifest, reasons.get((step, checkpoint.digest))
            world_size, created = manifest.world_size, manifest.created
            step = manifest.step if step is None else step
            there = {entry.name: entry.size for entry in entries}
            problem = _missing([file.name for file in manifest.files if there.get(f"{prefix}{file.name}") != file.size])
            if problem is None and failed is not None:
                problem = f"a restore of it has failed: {failed}"
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
        modified=max((entry.modified for entry in entries), default=0.0),
        problem=problem,
    )


def _ask_journal(listed: Listed, telling: JournalEntry | None, ended: JournalEntry | None) -> Listed:
    """What the journal adds to a step without a manifest: an entry that still tells of its save, or one that is outdated."""
    if telling is not None:
        problem = None
        if telling.state == "failed":
            problem = (
                f"{telling.error}: {telling.message}" if telling.error else "its save failed; the journal does not tell why"
            )
        return replace(listed, state=telling.state, modified=max(listed.modified, telling.modified), problem=problem)
    if ended is not None and ended.state != "failed":
        return replace(listed, problem=f"its save was {ended.state} and never finished")
    return listed


def _missing(names: Sequence[str]) -> str | None:
    if not names:
        return None
    return f"{names[0]}{f' and {len(names) - 1} more files are' if len(names) > 1 else ' is'} missing or not of full size"
