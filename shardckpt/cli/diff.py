# SPDX-License-Identifier: Apache-2.0
"""``shardckpt diff``: how two checkpoints differ."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from shardckpt.maintain.stored import open_checkpoint
from shardckpt.store import open_store

from .arguments import AsJson, Keys, Memory, PerRank
from .output import FOUND, count_text, print_json, print_table, progress_bar, say, size_text

if TYPE_CHECKING:
    from shardckpt.maintain.diff import Difference, TensorDifference

_HELP = "A checkpoint's directory, a root (its newest step is taken), or the URL of one."


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=_HELP)],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one; world size and layout may differ.")],
    keys: Keys = None,
    layouts: Annotated[bool, typer.Option("--layouts", help="List the tensors that were spread differently.")] = False,
    per_rank: PerRank = False,
    memory: Memory = 256,
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints: names, dtypes, shapes, values, and how many elements of each tensor differ in any bit.

    The exit status is 1 when their content differs. A different layout is no difference.

    --json: {equal, a, b, only_in_a, only_in_b, kinds: [{name, a, b}], tensors: [{name, rank, elements, differing, not_finite,
    max_difference}], values: [{name, a, b}], layouts: [{name, a, b}], per_rank_included, tensors_compared, bytes_read}
    """
    from shardckpt.maintain.diff import diff as compare  # needs torch

    one, other = open_checkpoint(open_store(a)), open_checkpoint(open_store(b))
    with progress_bar("comparing", hidden=as_json) as progress:
        found = compare(one, other, keys=keys, per_rank=per_rank, memory=memory << 20, progress=progress)
    if as_json:
        print_json({"equal": found.equal, **{field: getattr(found, field) for field in found.__dataclass_fields__}})
    else:
        _print(found, layouts)
    if not found.equal:
        raise typer.Exit(FOUND)


def _print(found: Difference, layouts: bool) -> None:
    say(f"a: {found.a}")
    say(f"b: {found.b}")
    for side, names in (("a", found.only_in_a), ("b", found.only_in_b)):
        for name in names:
            say(f"only in {side}: {name}")
    if found.kinds:
        print_table(("name", "a", "b"), [(change.name, change.a, change.b) for change in found.kinds])
    if found.tensors:
        columns = ("name", "differing", "of", "NaN or inf", "largest difference")
        print_table(columns, [_row(tensor) for tensor in found.tensors], numbers=columns[1:])
    if found.values:
        rows = [(change.name, json.dumps(change.a), json.dumps(change.b)) for change in found.values]
        print_table(("name", "a", "b"), rows)
    if layouts and found.layouts:
        print_table(("name", "a", "b"), [(change.name, change.a, change.b) for change in found.layouts])
    _print_summary(found)


def _row(tensor: TensorDifference) -> tuple[str, ...]:
    name = tensor.name if tensor.rank is None else f"{tensor.name} (rank {tensor.rank})"
    largest = "" if tensor.max_difference is None else f"{tensor.max_difference:.6g}"
    return name, f"{tensor.differing:,}", f"{tensor.elements:,}", f"{tensor.not_finite:,}", largest


def _print_summary(found: Difference) -> None:
    compared = f"{count_text(found.tensors_compared, 'tensor')} compared, {size_text(found.bytes_read)} read"
    spread = f"; {len(found.layouts)} spread differently (see --layouts)" if found.layouts else ""
    if found.equal:
        say(f"equal: {compared}{spread}")
        return
    parts = [
        (len(found.only_in_a), "only in a"),
        (len(found.only_in_b), "only in b"),
        (len(found.kinds), "of another kind, dtype or shape"),
        (len(found.tensors), "with other elements"),
        (len(found.values), "with another value"),
    ]
    say(f"different: {', '.join(f'{count} {what}' for count, what in parts if count)}; {compared}{spread}")
