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
OptimizerKey = Annotated[str, typer.Option("--optimizer-key", metavar="NAME", help="Where in the state the optimizer is.")]
Stage = Annotated[int, typer.Option("--stage", min=1, max=3, help="ZeRO stage of the engine that will load it.")]
WorldSize = Annotated[int, typer.Option("--world-size", min=1, metavar="N", help="Number of its ranks.")]
Tag = Annotated[str | None, typer.Option("--tag", help="Name of the directory in OUT.  [default: global_step<N>]")]
EngineDtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar="DTYPE", help="What the engine computes with: bf16, fp16 or fp32; as it was by default."),
]
Order = Annotated[
    typer.FileText | None,
    typer.Option("--order", metavar="FILE", help="Names of all parameters, one a line, as model.named_parameters() has them."),
]
SubGroupSize = Annotated[int, typer.Option("--sub-group-size", min=1, help="As in the engine's configuration of stage 3.")]
RoundRobin = Annotated[
    bool, typer.Option("--round-robin-gradients", help="As in the engine's configuration of stages 1 and 2.")
]
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


@export.command("deepspeed")
def export_deepspeed(
    path: Place,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The directory for engine.load_checkpoint.")],
    stage: Stage,
    world_size: WorldSize,
    tag: Tag = None,
    dtype: EngineDtype = None,
    order: Order = None,
    key: ModelKey = "model",
    optimizer_key: OptimizerKey = "optimizer",
    sub_group_size: SubGroupSize = 10**9,
    round_robin: RoundRobin = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a directory that DeepSpeed 0.19 resumes from; DeepSpeed need not be installed.

    From checkpoints of DeepSpeed engines, and of any training that saved its model and optimizer; those do not tell in which
    order parameters lie in their groups, so --order and --dtype are needed.

    --json: {path, tag, source, step, stage, world_size, dtype, bytes, files: [{file, bytes}], notes, written}
    """
    from shardckpt.interop.export.deepspeed import export_deepspeed as run

    stored = _open(path)
    with progress_bar("writing", hidden=as_json or dry_run) as progress:
        done = run(
            stored,
            out,
            stage=stage,
            world_size=world_size,
            tag=tag,
            dtype=None if dtype is None else parse_dtype(dtype),
            order=None if order is None else _names(order),
            key=key,
            optimizer_key=optimizer_key,
            sub_group_size=sub_group_size,
            round_robin=round_robin,
            replace=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    if as_json:
        print_json(done)
        return
    for file in done.files:
        say(f"{done.tag}/{file.file}  {size_text(file.bytes)}")
    for note in done.notes:
        say(f"taken for granted: {note}")
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


def _names(file: typer.FileText) -> list[str]:
    try:
        return [line.strip() for line in file if line.strip()]
    except UnicodeDecodeError:
        raise ConfigError(f"--order {file.name}: it is no text; write the names of all parameters, one a line") from None


def _open(path: str) -> StoredCheckpoint:
    from shardckpt.maintain.stored import open_checkpoint

    return open_checkpoint(open_store(path))


def _conclude(written: bool, path: str, nbytes: int, source: str) -> None:
    say(f"{size_text(nbytes)} {'written to' if written else 'would be written to'} {path}, from {source}")
