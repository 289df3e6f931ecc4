# SPDX-License-Identifier: Apache-2.0
"""``shardckpt prune``: remove old steps of a root."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from shardckpt.errors import CheckpointNotFound
from shardckpt.journal import Journal, JournalEntry, outdated
from shardckpt.options import Retention
from shardckpt.root import Root, commit_times
from shardckpt.store import open_store

from .arguments import AsJson, RootPlace
from .output import count_text, print_json, progress_bar, say, size_text


def prune(
    root: RootPlace,
    keep_last: Annotated[int, typer.Option("--keep-last", metavar="N", min=1, help="Keep the N newest committed steps.")],
    keep_every: Annotated[
        int | None, typer.Option("--keep-every", metavar="K", min=1, help="Also keep the steps that are multiples of K.")
    ] = None,
    abandoned: Annotated[
        float | None,
        typer.Option(
            "--incomplete-older-than",
            metavar="HOURS",
            min=0,
            help="Also remove steps without a manifest of which no file was written for that long, and markers of that age.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be removed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove committed steps of a root but the newest ones.

    Steps without a manifest may be saves that are running; they are left alone unless --incomplete-older-than is given.
    Markers of saves that were killed or have failed go when newer saves have made them meaningless.

    --json: {path, dry_run, kept: [step], removed: [{step, files, bytes}], bytes, markers: [{step, attempt, state, modified,
    names, error, message}]}
    """
    store = open_store(root)
    steps = Root(store)
    entries = Journal(store).entries()
    found = steps.scan()
    if not found and not entries:
        raise CheckpointNotFound(f"there is no step in {store.url}", url=store.url)
    before = None if abandoned is None else time.time() - 3600 * abandoned
    removals = steps.plan_prune(Retention(keep_last=keep_last, keep_every=keep_every), abandoned_before=before)
    markers = outdated(entries, commit_times(found), time.time(), before or 0.0)
    nbytes = sum(removal.nbytes for removal in removals)
    if not dry_run:
        with progress_bar("removing", hidden=as_json) as progress:
            done = 0
            for removal in removals:
                steps.prune([removal])
                done += removal.nbytes
                progress(done, nbytes)
        for name in (name for entry in markers for name in entry.names):
            store.delete(name)
    gone = {removal.step for removal in removals}
    kept = [files.step for files in found if files.committed and files.step not in gone]
    if as_json:
        removed = [{"step": r.step, "files": len(r.names), "bytes": r.nbytes} for r in removals]
        plan = {"kept": kept, "removed": removed, "bytes": nbytes, "markers": markers}
        print_json({"path": store.url, "dry_run": dry_run, **plan})
        return
    for removal in removals:
        say(f"step {removal.step}: {count_text(len(removal.names), 'file')}, {size_text(removal.nbytes)}")
    for entry in markers:
        say(f"step {entry.step}: marker of a save that {_fate(entry)}")
    verb = "would be removed" if dry_run else "removed"
    say(f"{count_text(len(removals), 'step')} {verb}, {size_text(nbytes)}; kept: {', '.join(map(str, kept)) or 'none'}")


def _fate(entry: JournalEntry) -> str:
    return "failed" if entry.state == "failed" else f"was {entry.state} and never finished"
