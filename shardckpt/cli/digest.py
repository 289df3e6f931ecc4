# SPDX-License-Identifier: Apache-2.0
"""``shardckpt digest``: a digest of the content that does not depend on how it was sharded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardckpt.maintain.stored import open_checkpoint
from shardckpt.store import open_store

from .arguments import AsJson, Keys, Memory, PerRank, Place
from .output import count_text, print_json, print_table, progress_bar, say, size_text

if TYPE_CHECKING:
    from shardckpt.maintain.digest import ContentDigest


def digest(
    path: Place,
    tensors: Annotated[bool, typer.Option("--tensors", help="Print the digest of each tensor too.")] = False,
    keys: Keys = None,
    per_rank: PerRank = False,
    memory: Memory = 256,
    as_json: AsJson = False,
) -> None:
    """Print a digest of the content: equal for equal states, from whatever world size and layout they were saved.

    It covers the bytes of all tensors (xxh3-128 in row-major order), their names, dtypes and shapes, and all values. All data
    is read and verified.

    --json: {path, step, digest, tensors: {name: digest}, per_rank: {name: {rank: digest}}, per_rank_included, values,
    bytes_read}
    """
    from shardckpt.maintain.digest import digest_content  # needs torch

    stored = open_checkpoint(open_store(path))
    with progress_bar("reading", hidden=as_json) as progress:
        found = digest_content(stored, keys=keys, per_rank=per_rank, memory=memory << 20, progress=progress)
    if as_json:
        print_json(_document(found))
        return
    if tensors:
        _print_tensors(found)
    covered = f"{count_text(len(found.tensors), 'tensor')}, {count_text(found.values, 'value')}"
    say(f"{found.digest}  step {found.step}: {covered}, {size_text(found.bytes_read)}")
    if found.per_rank and not per_rank:
        names = count_text(len({leaf.name for leaf in found.per_rank}), "name")
        say(f"left out: {names} that ranks saved each for itself; --per-rank covers them")


def _print_tensors(found: ContentDigest) -> None:
    rows = [
        (
            leaf.name,
            "" if leaf.rank is None else str(leaf.rank),
            leaf.dtype,
            "x".join(map(str, leaf.shape)) or "scalar",
            leaf.digest,
        )
        for leaf in (*found.tensors, *found.per_rank)
    ]
    print_table(("name", "rank", "dtype", "shape", "xxh3-128"), rows, numbers=("rank",))


def _document(found: ContentDigest) -> dict[str, Any]:
    per_rank: dict[str, dict[str, str]] = {}
    for leaf in found.per_rank:
        per_rank.setdefault(leaf.name, {})[str(leaf.rank)] = leaf.digest
    return {
        "path": found.path,
        "step": found.step,
        "digest": found.digest,
        "tensors": {leaf.name: leaf.digest for leaf in found.tensors},
        "per_rank": per_rank,
        "per_rank_included": found.per_rank_included,
        "values": found.values,
        "bytes_read": found.bytes_read,
    }
