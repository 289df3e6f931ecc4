# SPDX-License-Identifier: Apache-2.0
"""``shardckpt prune``: remove old steps of a root, and what saves have left behind that were killed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from shardckpt.errors import CheckpointNotFound
from shardckpt.journal import Journal, JournalEntry, outdated
from shardckpt.options import GRACE_SECONDS, Retention
from shardckpt.pruning import Pruner, Removal, storage_time
from shardckpt.root import Root, commit_times
from shardckpt.store import open_store

from .arguments import AsJson, RootPlace
from .output import count_text, print_json, progress_bar, say, size_text


def prune(
    root: RootPlace,
    keep_last: Annotated[
        int | None,
        typer.Option("--keep-last", metavar="N", min=1, help="Keep the N newest committed steps; without it, all of them."),
    ] = None,
    keep_every: Annotated[
        int | None, typer.Option("--keep-every", metavar="K", min=1, help="Also keep the steps that are multiples of K.")
    ] = None,
    abandoned: Annotated[
        float | None,
        typer.Option(
            "--incomplete-older-than",
            metavar="HOURS",
            min=0,
            help="After how long without a sign of life a save is dead: 24 hours, unless this is given, which takes markers of "
            "that age too. Less than the longest save takes is safe only when none is under way.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be removed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove committed steps of a root but the newest ones, and what was left by saves that were killed.

    Files of an attempt at a save that was not committed, temporary files and empty directories of steps go when nothing of them
    was written for 24 hours, by the clock of the storage (a file that is put there for a moment tells it). Markers of saves
    that were killed or have failed go when newer saves have made them meaningless.

    It may run while others save, load and prune. What has changed since it was planned stays.

    --json: {path, dry_run, kept: [step], removed: [{what: "step", "attempt", "temporary" or "directory", step, attempt, files,
    bytes}], changed: [as removed], bytes, markers: [{step, attempt, state, modified, names, error, message}]}
    """
    retention = Retention(keep_last=keep_last, keep_every=keep_every)
    store = open_store(root)
    if not Root(store).look().is_known and not store.empty_directories():
        raise CheckpointNotFound(f"there is no step in {store.url}", url=store.url)
    now = storage_time(store)
    entries = Journal(store).entries()
    found = Root(store).look()
    grace = GRACE_SECONDS if abandoned is None else 3600 * abandoned
    before = None if now is None else now - grace
    pruner = Pruner(store)
    plan = pruner.plan(found, retention, dead_before=before, directories=store.empty_directories())
    latest = max((entry.modified for entry in entries), default=0.0)
    markers = outdated(entries, commit_times(found.steps), now or latest, 0.0 if abandoned is None else before or 0.0)
    changed = [] if dry_run else _carry_out(pruner, plan, hidden=as_json)
    if not dry_run:
        for name in (name for entry in markers for name in entry.names):
            store.delete(name)
        pruner.forget_gone()
    going = [removal for removal in plan if removal not in changed]
    gone = {removal.step for removal in going if removal.what == "step"}
    kept = [files.step for files in found.steps if files.committed and files.step not in gone]
    if as_json:
        sizes = {"bytes": sum(removal.nbytes for removal in going), "markers": markers}
        done = {"kept": kept, "removed": [*map(_document, going)], "changed": [*map(_document, changed)], **sizes}
        print_json({"path": store.url, "dry_run": dry_run, **done})
        return
    _print_removals(going, changed, markers)
    _print_total(going, kept, dry_run=dry_run, told=now is not None)


def _carry_out(pruner: Pruner, plan: Sequence[Removal], *, hidden: bool) -> list[Removal]:
    """Remove; what has changed meanwhile."""
    done, total = 0, sum(removal.nbytes for removal in plan)
    changed = []
    with progress_bar("removing", hidden=hidden) as progress:
        for removal in plan:
            if not pruner.remove(removal):
                changed.append(removal)
            done += removal.nbytes
            progress(done, total)
    return changed


def _print_removals(going: Sequence[Removal], changed: Sequence[Removal], markers: Sequence[JournalEntry]) -> None:
    for removal in going:
        say(f"{_place(removal)}: {_describe(removal)}")
    for removal in changed:
        say(f"{_place(removal)}: {_describe(removal)}; left, as it has changed meanwhile")
    for entry in markers:
        say(f"step {entry.step}: marker of a save that {_fate(entry)}")


def _print_total(going: Sequence[Removal], kept: Sequence[int], *, dry_run: bool, told: bool) -> None:
    verb = "would be removed" if dry_run else "removed"
    steps = sum(removal.what == "step" for removal in going)
    dead = len(going) - steps
    left = f" and {count_text(dead, 'piece')} of what was left behind" if dead else ""
    nbytes = size_text(sum(removal.nbytes for removal in going))
    say(f"{count_text(steps, 'step')}{left} {verb}, {nbytes}; kept: {', '.join(map(str, kept)) or 'none'}")
    if not told:
        say("attempts that are not committed were left: what time it is on the storage cannot be told")


def _document(removal: Removal) -> dict[str, object]:
    files = 0 if removal.what == "directory" else len(removal.entries)
    named = {"what": removal.what, "step": removal.step, "attempt": removal.attempt}
    return {**named, "files": files, "bytes": removal.nbytes}


def _place(removal: Removal) -> str:
    return "root" if removal.step is None else f"step {removal.step}"


def _describe(removal: Removal) -> str:
    files = f"{count_text(len(removal.entries), 'file')}, {size_text(removal.nbytes)}"
    match removal.what:
        case "step":
            return files
        case "attempt":
            return f"{files}, of a save that was not committed ({removal.attempt})"
        case "temporary":
            return f"{files}, temporary"
        case "directory":
            return "an empty directory"


def _fate(entry: JournalEntry) -> str:
    return "failed" if entry.state == "failed" else f"was {entry.state} and never finished"
