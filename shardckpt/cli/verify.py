# SPDX-License-Identifier: Apache-2.0
"""``shardckpt verify``: whether what is stored is what was saved."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from shardckpt.errors import ConfigError
from shardckpt.store import open_store

from .arguments import AsJson
from .output import FOUND, count_text, print_json, print_table, progress_bar, say, size_text

if TYPE_CHECKING:
    from shardckpt.maintain.verify import Problem, Verification

_MOST_TENSORS = 4


def verify(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A checkpoint's directory, a root (all its steps are verified), or a URL.")
    ],
    read_data: Annotated[bool, typer.Option("--read-data", help="Also read all data and compare it with its digests.")] = False,
    part: Annotated[
        str | None,
        typer.Option(
            "--read-data-subset",
            metavar="PART",
            help="Read a part of the data: a random share of each checkpoint, such as 5%, or one of several parts, such as "
            "2/10; ten runs with 1/10 to 10/10 read all of it.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Choose the same random share as a run that has printed this seed.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Verify manifests, files, sizes and headers; with --read-data also every byte of data.

    All problems of all steps are found, not only the first one. A step that is pruned meanwhile is no problem.

    Exit status: 0 when all that was looked at is good; 1 when something is damaged, or nothing is there; 2 for wrong usage.

    --json: {ok, seed, checkpoints: [{path, step, ok, removed, files, bytes, data_bytes, bytes_read, problems: [{kind, file,
    start, stop, tensors, message}]}]}. The seed is null unless a random share was read.
    """
    from shardckpt.maintain.subset import EVERYTHING, Subset
    from shardckpt.maintain.verify import verify as verify_store  # needs torch

    if part is not None and read_data:
        raise ConfigError("--read-data reads all of the data, --read-data-subset a part of it: give one of them")
    if seed is not None and (part is None or "/" in part):
        raise ConfigError("--seed chooses what is read for a random share: give it with --read-data-subset 5%, say")
    drawn = secrets.randbelow(1 << 32) if seed is None else seed
    subset = EVERYTHING if part is None else Subset.parse(part, drawn)
    read_data = read_data or part is not None
    store = open_store(path)
    with progress_bar("verifying", hidden=as_json or not read_data) as progress:
        found = verify_store(store, read_data=read_data, subset=subset, progress=progress)
    ok = all(verification.ok for verification in found)
    if as_json:
        told = drawn if part is not None and subset.part is None else None
        print_json({"ok": ok, "seed": told, "checkpoints": [_document(verification) for verification in found]})
    else:
        _print_all(found, read_data)
        if part is not None and subset.part is None:
            say(f"read was a random share of {part}, of seed {drawn}")
    if not ok:
        raise typer.Exit(FOUND)


def _document(verification: Verification) -> dict[str, object]:
    fields = ("path", "step", "ok", "removed", "files", "bytes", "data_bytes", "bytes_read", "problems")
    return {field: getattr(verification, field) for field in fields}


def _print_all(found: Sequence[Verification], read_data: bool) -> None:
    if len(found) == 1:
        (only,) = found
        say(f"{only.path}: {_summary(only, read_data)}")
    else:
        columns = ("step", "state", "files", "size", "data read", "problems", "directory")
        print_table(columns, [_row(verification) for verification in found], numbers=(columns[0], *columns[2:6]))
    for verification in found:
        for problem in verification.problems:
            _print_problem(problem)
    if len(found) > 1:
        _print_total(found, read_data)


def _summary(verification: Verification, read_data: bool) -> str:
    if verification.removed:
        return "removed while it was verified"
    if not verification.ok:
        return f"DAMAGED, {count_text(len(verification.problems), 'problem')}"
    files = count_text(verification.files, "file")
    return f"ok ({files}, {size_text(verification.bytes)}; {_extent([verification], read_data)})"


def _row(verification: Verification) -> tuple[str, ...]:
    state = "removed" if verification.removed else "ok" if verification.ok else "DAMAGED"
    return (
        "?" if verification.step is None else str(verification.step),
        state,
        str(verification.files),
        size_text(verification.bytes),
        size_text(verification.bytes_read),
        str(len(verification.problems)),
        verification.path.rpartition("/")[2],
    )


def _print_total(found: Sequence[Verification], read_data: bool) -> None:
    damaged = [verification for verification in found if not verification.ok]
    removed = sum(verification.removed for verification in found)
    parts = [
        f"{len(found) - len(damaged) - removed} of {count_text(len(found), 'step')} ok",
        *([f"{len(damaged)} DAMAGED"] if damaged else []),
        *([f"{removed} removed meanwhile"] if removed else []),
        size_text(sum(verification.bytes for verification in found)),
    ]
    say(f"{', '.join(parts)}; {_extent(found, read_data)}")


def _extent(found: Sequence[Verification], read_data: bool) -> str:
    """How much of the data was compared with its digests."""
    read, total = sum(v.bytes_read for v in found), sum(v.data_bytes for v in found)
    if not read_data:
        return "data not read, see --read-data"
    return "all data read" if read == total else f"{size_text(read)} of {size_text(total)} of data read"


def _print_problem(problem: Problem) -> None:
    where = problem.file if problem.start is None else f"{problem.file}, bytes [{problem.start}, {problem.stop})"
    say(f"  {problem.kind} in {where}")
    say(f"    {problem.message}")
    if problem.tensors:
        more = len(problem.tensors) - _MOST_TENSORS
        names = ", ".join(problem.tensors[:_MOST_TENSORS])
        say(f"    tensors: {names}{f' and {more} more' if more > 0 else ''}")
