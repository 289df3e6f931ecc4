# SPDX-License-Identifier: Apache-2.0
"""``shardckpt import``: checkpoints of other programs become steps of a root."""

from __future__ import annotations

from typing import Annotated

import typer

from .arguments import AsJson
from .output import count_text, print_json, progress_bar, say, size_text

import_ = typer.Typer(no_args_is_help=True)


@import_.callback()
def _commands() -> None:
    """Read checkpoints of other programs."""


@import_.command("deepspeed")
def import_deepspeed(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="The directory that was given to save_checkpoint, or one of a tag.")
    ],
    root: Annotated[str, typer.Argument(metavar="DST", help="The root of the run, which gets one more step.")],
    tag: Annotated[str | None, typer.Option("--tag", help="Which checkpoint; by default what the file latest says.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read all descriptions, and write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Import a checkpoint of DeepSpeed (ZeRO 1, 2 or 3, or universal), under the names and shapes of plain training.

    DeepSpeed is not needed, and no code of the files is run. The source is left as it is.

    --json: {source, tag, step, tensors, bytes, url, digest, dry_run}
    """
    from shardckpt.interop.deepspeed import import_deepspeed as run

    with progress_bar("importing", hidden=as_json or dry_run) as progress:
        done = run(source, root, tag=tag, dry_run=dry_run, progress=progress)
    url, digest = (done.saved.url, done.saved.digest) if done.saved is not None else (None, None)
    if as_json:
        found = {"source": done.source, "tag": done.tag, "step": done.step, "tensors": done.tensors, "bytes": done.bytes}
        print_json({**found, "url": url, "digest": digest, "dry_run": dry_run})
        return
    what = f"{count_text(done.tensors, 'tensor')}, {size_text(done.bytes)}"
    say(f"{done.source}: step {done.step}, {what}; {'nothing was written' if url is None else f'imported to {url}'}")
