# SPDX-License-Identifier: Apache-2.0
"""``shardckpt export``: checkpoints as files of other programs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from shardckpt.errors import ConfigError
from shardckpt.store import open_store

from .arguments import AsJson, Keys, Place
from .output import count_text, print_json, progress_bar, say, size_text

if TYPE_CHECKING:
    from shardckpt.maintain.stored import StoredCheckpoint

export = typer.Typer(no_args_is_help=True)

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only print what would be written.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Put it in the place of what is there.")]
ModelKey = Annotated[str, typer.Option("--key", metavar="NAME", help="Where in the state the model is.")]
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.ASCII | re.IGNORECASE)


@export.command("safetensors")
def export_safetensors(
    path: Place,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The new directory.")],
    key: ModelKey = "model",
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="DTYPE", help=f"Convert floating-point weights: {', '.join(DTYPES)}."),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Bytes of tensors per file, such as 500MB or 5GiB.")
    ] = "5GB",
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the weights as Hugging Face does: safetensors files, and an index when there are several.

    All that is read is verified. Tied weights are stored once; the metadata of their file says under which name.

    --json: {path, source, step, bytes, shards: [{file, bytes, tensors}], tied, left_out, written}
    """
    from shardckpt.interop.export.safetensors import export_safetensors as run

    most = parse_size(max_shard_size)
    wanted = None if dtype is None else parse_dtype(dtype)
    stored = _open(path)
    with progress_bar("writing", hidden=as_json or dry_run) as progress:
        done = run(
            stored, out, key=key, dtype=wanted, max_shard_bytes=most, replace=overwrite, dry_run=dry_run, progress=progress
        )
    if as_json:
        print_json(done)
        return
    for shard in done.shards:
        say(f"{shard.file}  {size_text(shard.bytes)}  {count_text(len(shard.tensors), 'tensor')}")
    for other, name in sorted(done.tied.items()):
        say(f"{other} is stored as {name}")
    for name in done.left_out:
        say(f"{name} is no tensor of all ranks, and left out")
    _conclude(done.written, done.path, done.bytes, done.source)


@export.command("torch")
def export_torch(
    path: Place,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The new file.")],
    keys: Keys = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the state as one file for torch.load(weights_only=True).

    It is what shardckpt.load(PATH).state is: what ranks saved each for itself is a dict by rank. All that is read is verified.

    --json: {path, source, step, tensors, bytes, written}
    """
    from shardckpt.interop.export.single import export_torch as run

    stored = _open(path)
    with progress_bar("writing", hidden=as_json or dry_run) as progress:
        done = run(stored, out, keys=keys, replace=overwrite, dry_run=dry_run, progress=progress)
    if as_json:
        print_json(done)
        return
    say(count_text(done.tensors, "tensor"))
    _conclude(done.written, done.path, done.bytes, done.source)


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB`` (decimal) or ``5GiB`` (binary); ConfigError when it is none."""
    found = _SIZE.fullmatch(text.strip())
    nbytes = 0
    if found is not None:
        number, unit, binary = found.groups()
        base = 1024 if binary else 1000
        nbytes = int(float(number) * base ** (" KMGT".index(unit.upper()) if unit else 0))
    if nbytes < 1:
        raise ConfigError(f"{text!r} is not a size: write a number of bytes, or one with a unit, such as 500MB or 5GiB")
    return nbytes


def parse_dtype(text: str) -> str:
    """The name of the dtype that is called ``text`` on the command line; ConfigError when there is none."""
    name = DTYPES.get(text, text)
    if name not in DTYPES.values():
        raise ConfigError(f"--dtype {text}: it is one of {', '.join(DTYPES)}")
    return name


def _open(path: str) -> StoredCheckpoint:
    from shardckpt.maintain.stored import open_checkpoint

    return open_checkpoint(open_store(path))


def _conclude(written: bool, path: str, nbytes: int, source: str) -> None:
    say(f"{size_text(nbytes)} {'written to' if written else 'would be written to'} {path}, from {source}")
