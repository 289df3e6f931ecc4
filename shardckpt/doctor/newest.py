# SPDX-License-Identifier: Apache-2.0
"""What the newest checkpoint of a root is like: the next one will be, too."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import IntegrityError, UnsupportedVersion
from ..maintain.stored import open_checkpoint
from ..manifest import MANIFEST_NAME, step_directory
from ..root import Root, StepFiles, attempt_of
from ..store import Store
from .finding import Finding, amount, refusal

CHECK = "newest checkpoint"


@dataclass(frozen=True, slots=True)
class Newest:
    """The newest checkpoint of a root whose manifest can be read."""

    step: int
    """Number of its training step."""
    world_size: int
    """Ranks that saved it."""
    nbytes: int
    """Of all its files, parity included."""
    files: int
    """How many those are."""
    staged: int
    """Bytes that all ranks together stage for one like it."""
    damaged: tuple[str, ...] = ()
    """Names of files that are missing, or have another size than the manifest says."""


def find_newest(store: Store) -> tuple[Newest | None, list[Finding]]:
    """The newest checkpoint in a root, None without any; and what there is to say of it, and of newer ones.

    Raises `NotACheckpointRoot` and `StoreError`.
    """
    committed = [found for found in Root(store).scan() if found.committed]
    if not committed:
        # as a Checkpointer does before its first restore and save
        Root(store).require_no_checkpoint()
        Root(store).require_place("step-")
    findings = []
    for found in reversed(committed):
        try:
            newest = _look_at(store, found)
        except IntegrityError as error:
            findings.append(_unreadable(store, found.step, error))
            continue
        return newest, [*findings, _describe(store, newest)]
    return None, findings


def _look_at(store: Store, found: StepFiles) -> Newest:
    manifest = open_checkpoint(store, f"{step_directory(found.step)}/").checkpoint.manifest
    leaves = {entry.name.rpartition("/")[2]: entry.size for entry in found.entries}
    stored = {leaf: size for leaf, size in leaves.items() if leaf == MANIFEST_NAME or attempt_of(leaf) == manifest.attempt}
    saved = {file.name: file.size for file in manifest.files}
    sizes = stored | saved
    damaged = tuple(name for name, size in saved.items() if stored.get(name) != size)
    return Newest(manifest.step, manifest.world_size, sum(sizes.values()), len(sizes), sum(saved.values()), damaged)


def _describe(store: Store, newest: Newest) -> Finding:
    text = f"step {newest.step}: {amount(newest.nbytes)} by {newest.world_size} rank{'' if newest.world_size == 1 else 's'}"
    values = {"step": newest.step, "world_size": newest.world_size, "bytes": newest.nbytes, "files": newest.files}
    if not newest.damaged:
        return Finding(CHECK, "ok", text, values=values)
    count = len(newest.damaged)
    text += f"; {newest.damaged[0]} {f'and {count - 1} more are' if count > 1 else 'is'} missing, or of another size"
    remedy = f"shardckpt verify {_path(store, newest.step)} says what is damaged, and shardckpt repair mends it where it can"
    return Finding(CHECK, "warning", text, remedy, values={**values, "damaged": list(newest.damaged)})


def _unreadable(store: Store, step: int, error: IntegrityError) -> Finding:
    path = _path(store, step)
    finding = refusal(CHECK, error)
    if isinstance(error, UnsupportedVersion):
        return replace(finding, text=f"step {step} ({path}): {finding.text}")
    remedy = f"look at it with shardckpt verify {path}; shardckpt prune removes it when newer steps are there"
    return replace(finding, text=f"step {step} ({path}): {error.message}", remedy=remedy)


def _path(store: Store, step: int) -> str:
    return f"{store.url}/{step_directory(step)}"
