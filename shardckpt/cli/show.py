# SPDX-License-Identifier: Apache-2.0
"""``shardckpt show``: what one checkpoint holds, and how it was spread over ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from shardckpt.errors import CheckpointError
from shardckpt.maintain.contents import Item, list_items, matches, require_matches
from shardckpt.maintain.stored import StoredCheckpoint, open_checkpoint
from shardckpt.maintain.timings import list_timings
from shardckpt.parity.record import find_parity
from shardckpt.store import open_store

from .arguments import AsJson, Place
from .output import count_text, print_fields, print_json, print_table, say, size_text
from .timings import print_timings


def show(
    path: Place,
    tensors: Annotated[
        list[str] | None,
        typer.Option("--tensors", metavar="GLOB", help="List only names that match, such as 'model/*'. May be repeated."),
    ] = None,
    values: Annotated[bool, typer.Option("--values", help="List the values too (hyperparameters, counters).")] = False,
    timings: Annotated[
        bool, typer.Option("--timings", help="Instead of tensors, show what the save spent its time on, by phase and rank.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show a checkpoint: when and by whom it was saved, and for each tensor dtype, shape, placement and who wrote it.

    --json: {path, step, created, world_size, digest, attempt, bytes, files: [{rank, name, size}],
    parity: {groups: [[rank]], files: [{name, size}]} or null when there is none that counts, torch, shardckpt, metadata,
    tensors: [{name, kind, dtype, shape, bytes, layout: {placement, mesh, ranks, writers}, alias_of}], values: {name: value}}.
    With --timings also timings: [{phase, seconds: [by rank], bytes: [by rank] or null, slowest}], which is empty when the
    manifest does not tell; of receipts there is rank 0 only.
    """
    stored = open_checkpoint(open_store(path))
    require_matches(tensors, stored)
    items = [item for item in list_items(stored, tensors) if item.kind != "value"]
    objects = {n: v for n, v in sorted(stored.checkpoint.manifest.objects.items()) if matches(n, tensors)}
    if as_json:
        print_json(_document(stored, items, objects) | ({"timings": list_timings(stored)} if timings else {}))
        return
    print_fields(_summary(stored))
    say()
    if timings:
        _print_timings(stored)
    else:
        columns = ("name", "dtype", "shape", "size", "placement", "mesh", "ranks", "writers")
        print_table(columns, [_row(item) for item in items], numbers=("size",))
    if values:
        say()
        print_table(("name", "value"), [(name, json.dumps(value)) for name, value in objects.items()])


def _summary(stored: StoredCheckpoint) -> list[tuple[str, str]]:
    manifest, plan = stored.checkpoint.manifest, stored.checkpoint.plan
    on_disk = sum(file.size for file in manifest.files)
    aliases = f" and {count_text(len(plan.aliases), 'second name')}" if plan.aliases else ""
    fields = [
        ("checkpoint", stored.url),
        ("step", str(manifest.step)),
        ("created", manifest.created),
        ("saved by", f"{count_text(manifest.world_size, 'rank')}, shardckpt {manifest.shardckpt}, torch {manifest.torch}"),
        ("tensors", f"{count_text(len(plan.tensors), 'tensor')}{aliases}, {size_text(plan.total_bytes)}"),
        ("values", count_text(len(manifest.objects), "value")),
        ("files", f"{count_text(len(manifest.files), 'file')}, {size_text(on_disk)}"),
        ("parity", _parity_text(stored)),
        ("digest", f"{stored.checkpoint.digest} (SHA-256 of the manifest)"),
    ]
    if manifest.metadata:
        fields.append(("metadata", json.dumps(manifest.metadata)))
    return fields


def _parity_text(stored: StoredCheckpoint) -> str:
    """What can be rebuilt when it is lost."""
    try:
        parity = find_parity(stored.store, stored.prefix, stored.checkpoint)
    except CheckpointError as error:
        return f"none that counts: {error.message}"
    if parity is None:
        return "none"
    groups = parity.record.groups
    files = f"{count_text(len(parity.files), 'file')}, {size_text(sum(file.size for file in parity.files))}"
    of = f"{count_text(len(groups), 'group')} of up to {max(len(group.ranks) for group in groups)} ranks"
    return f"{files}, for one lost file in each of {of}"


def _parity_document(stored: StoredCheckpoint) -> dict[str, Any] | None:
    try:
        parity = find_parity(stored.store, stored.prefix, stored.checkpoint)
    except CheckpointError:
        parity = None
    if parity is None:
        return None
    files = [{"name": file.name, "size": file.size} for file in parity.files]
    return {"groups": [group.ranks for group in parity.record.groups], "files": files}


def _print_timings(stored: StoredCheckpoint) -> None:
    phases = list_timings(stored)
    if phases:
        print_timings(phases, stored.checkpoint.manifest.world_size)
    else:
        say(f"No timings: shardckpt {stored.checkpoint.manifest.shardckpt} put none into the manifest of this checkpoint.")


def _row(item: Item) -> tuple[str, ...]:
    shape = "" if item.shape is None else "x".join(map(str, item.shape)) or "scalar"
    layout = item.layout
    if item.alias_of is not None or layout is None:
        return item.name, item.dtype or "", shape, "", f"alias of {item.alias_of}", "", "", ""
    mesh = "x".join(map(str, layout.mesh)) if layout.mesh else ""
    dtype = item.dtype or "JSON"
    return item.name, dtype, shape, size_text(item.bytes), layout.placement, mesh, layout.ranks, layout.writers


def _document(stored: StoredCheckpoint, items: Sequence[Item], objects: dict[str, Any]) -> dict[str, Any]:
    manifest = stored.checkpoint.manifest
    return {
        "path": stored.url,
        "step": manifest.step,
        "created": manifest.created,
        "world_size": manifest.world_size,
        "digest": stored.checkpoint.digest,
        "attempt": manifest.attempt,
        "bytes": stored.checkpoint.plan.total_bytes,
        "files": [{"rank": file.rank, "name": file.name, "size": file.size} for file in manifest.files],
        "parity": _parity_document(stored),
        "torch": manifest.torch,
        "shardckpt": manifest.shardckpt,
        "metadata": manifest.metadata,
        "tensors": items,
        "values": objects,
    }
