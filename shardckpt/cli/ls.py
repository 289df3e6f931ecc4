# SPDX-License-Identifier: Apache-2.0
"""``shardckpt ls``: the steps of a root."""

from __future__ import annotations

from shardckpt.maintain.listing import Listed, list_steps
from shardckpt.store import open_store

from .arguments import AsJson, RootPlace
from .output import age_text, print_json, print_table, say, size_text


def ls(root: RootPlace, as_json: AsJson = False) -> None:
    """List the steps of a root: state, size, world size, age.

    A save that is under way is requested until rank 0 has copied its part of the state to host memory, and then staged until
    it is committed. One that failed is listed with its error until its step or a newer one is committed. A step is
    incomplete that has no manifest and no save that tells of itself: most likely, its save was killed. Damaged is one with a
    manifest or files that cannot be right, and one whose restore has failed for that reason; verify --read-data tells more.

    --json: {path, steps: [{name, step, state, world_size, files, bytes, created, modified, problem}]}
    """
    store = open_store(root)
    steps = list_steps(store)
    if as_json:
        print_json({"path": store.url, "steps": steps})
        return
    columns = ("step", "state", "ranks", "files", "size", "age", "directory")
    print_table(columns, [_row(found) for found in steps], numbers=columns[:1] + columns[2:6])
    for found in steps:
        if found.problem:
            say(f"{found.name}: {found.problem}")


def _row(found: Listed) -> tuple[str, ...]:
    return (
        "?" if found.step is None else str(found.step),
        found.state,
        "?" if found.world_size is None else str(found.world_size),
        str(found.files),
        size_text(found.bytes),
        age_text(found.created, found.modified),
        found.name,
    )
