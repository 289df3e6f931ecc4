# SPDX-License-Identifier: Apache-2.0
"""``shardckpt verify``: whether what is stored is what was saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shardckpt.store import open_store

from .arguments import AsJson
from .output import FOUND, count_text, print_json, progress_bar, say, size_text

if TYPE_CHECKING:
    from shardckpt.maintain.verify import Problem, Verification

_MOST_TENSORS = 4


def verify(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A checkpoint's directory, a root (all its steps are verified), or a URL.")
    ],
    read_data: Annotated[bool, typer.Option("--read-data", help="Also read all data and compare it with its digests.")] = False,
    as_json: AsJson = False,
) -> None:
    """Verify manifests, files, sizes and headers; with --read-data also every byte of data.

    All problems are found, not only the first one. The exit status is 1 when there are any.

    --json: {ok, checkpoints: [{path, step, ok, files, bytes, bytes_read, problems: [{kind, file, start, stop, tensors,
    message}]}]}
    """
    from shardckpt.maintain.verify import verify as verify_store  # needs torch

    store = open_store(path)
    with progress_bar("verifying", hidden=as_json or not read_data) as progress:
        found = verify_store(store, read_data=read_data, progress=progress)
    ok = all(verification.ok for verification in found)
    if as_json:
        print_json({"ok": ok, "checkpoints": [_document(verification) for verification in found]})
    else:
        for verification in found:
            _print(verification, read_data)
    if not ok:
        raise typer.Exit(FOUND)


def _document(verification: Verification) -> dict[str, object]:
    fields = ("path", "step", "ok", "files", "bytes", "bytes_read", "problems")
    return {field: getattr(verification, field) for field in fields}


def _print(verification: Verification, read_data: bool) -> None:
    if not verification.ok:
        say(f"{verification.path}: DAMAGED, {count_text(len(verification.problems), 'problem')}")
        for problem in verification.problems:
            _print_problem(problem)
        return
    checked = "all data read" if read_data else "data not read, see --read-data"
    files = count_text(verification.files, "file")
    say(f"{verification.path}: ok ({files}, {size_text(verification.bytes)}; {checked})")


def _print_problem(problem: Problem) -> None:
    where = problem.file if problem.start is None else f"{problem.file}, bytes [{problem.start}, {problem.stop})"
    say(f"  {problem.kind} in {where}")
    say(f"    {problem.message}")
    if problem.tensors:
        more = len(problem.tensors) - _MOST_TENSORS
        names = ", ".join(problem.tensors[:_MOST_TENSORS])
        say(f"    tensors: {names}{f' and {more} more' if more > 0 else ''}")
