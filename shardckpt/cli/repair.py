# SPDX-License-Identifier: Apache-2.0
"""``shardckpt repair``: rebuild lost and damaged files from the parity of their group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from shardckpt.errors import CheckpointError
from shardckpt.failed_restores import FailedRestores
from shardckpt.maintain.repair import Repair, RepairPlan, carry_out, plan_repairs
from shardckpt.store import Store, open_store

from .arguments import AsJson
from .output import FOUND, count_text, print_json, progress_bar, say


def repair(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A checkpoint's directory, a root (all its steps are repaired), or a URL.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be done.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read all data, and rebuild what is missing or damaged from the other files of its group.

    That takes a save with Options(parity="xor:G"). A damaged file is replaced, at once, by one that matches the manifest's
    digests, and is gone then. The exit status is 1 when something cannot be repaired.

    --json: {path, dry_run, ok, checkpoints: [{path, step, files: [{file, problem, sources, repaired, obstacle}]}]}
    """
    store = open_store(path)
    with progress_bar("reading", hidden=as_json) as progress:
        plans = plan_repairs(store, progress=progress)
    obstacles = [[_repair(store, planned, dry_run) for planned in plan.repairs] for plan in plans]
    for plan, found in zip(plans, obstacles, strict=True):
        if plan.step is not None and not any(found) and not dry_run:
            # all of it was read, and is good now
            FailedRestores(store).forget(plan.step)
    ok = not any(obstacle for found in obstacles for obstacle in found)
    if as_json:
        checkpoints = [_document(plan, found, dry_run) for plan, found in zip(plans, obstacles, strict=True)]
        print_json({"path": store.url, "dry_run": dry_run, "ok": ok, "checkpoints": checkpoints})
    else:
        for plan, found in zip(plans, obstacles, strict=True):
            _print(plan, found, dry_run)
    if not ok:
        raise typer.Exit(FOUND)


def _repair(store: Store, planned: Repair, dry_run: bool) -> str | None:
    """Why a file is not, or cannot be, repaired; None when all is well with it."""
    if planned.obstacle is None and not dry_run:
        try:
            carry_out(store, planned)
        except CheckpointError as error:
            return error.message
    return planned.obstacle


def _document(plan: RepairPlan, obstacles: Sequence[str | None], dry_run: bool) -> dict[str, object]:
    files = [
        {
            "file": planned.file,
            "problem": planned.problem,
            "sources": planned.sources,
            "repaired": obstacle is None and not dry_run,
            "obstacle": obstacle,
        }
        for planned, obstacle in zip(plan.repairs, obstacles, strict=True)
    ]
    return {"path": plan.path, "step": plan.step, "files": files}


def _print(plan: RepairPlan, obstacles: Sequence[str | None], dry_run: bool) -> None:
    if not plan.repairs:
        say(f"{plan.path}: ok, nothing to repair")
        return
    say(f"{plan.path}: {count_text(len(plan.repairs), 'damaged file')}")
    for planned, obstacle in zip(plan.repairs, obstacles, strict=True):
        say(f"  {planned.file}")
        say(f"    {planned.problem}")
        if obstacle is not None:
            say(f"    cannot be repaired: {obstacle}")
        else:
            say(f"    {'would be rebuilt' if dry_run else 'rebuilt'} from {_sources(planned)}")


def _sources(planned: Repair) -> str:
    return ", ".join(planned.sources) or "itself and the manifest"
