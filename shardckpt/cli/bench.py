# SPDX-License-Identifier: Apache-2.0
"""``shardckpt bench``: the engine beside torch.distributed.checkpoint and the raw disk, on this machine."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from shardckpt.errors import ConfigError

from .arguments import AsJson
from .bench_tables import print_async, print_deepspeed, print_planning, print_report, print_restart
from .output import FOUND, print_json

if TYPE_CHECKING:
    # torch, which these import, takes seconds: only commands that measure pay for it
    from shardckpt.bench import Progress as Step
    from shardckpt.bench.spec import Cache, Device

app = typer.Typer(
    no_args_is_help=True,
    help="Measure speed on this machine, beside torch.distributed.checkpoint (DCP) and the raw disk.",
)

Size = Annotated[str, typer.Option(help="Size of the state of all ranks together, such as 2.9GB.")]
Ranks = Annotated[int, typer.Option(help="Processes that save.", min=1)]
Rounds = Annotated[int, typer.Option(help="Turns that each contestant takes.", min=1)]
Folder = Annotated[str, typer.Option("--dir", help="Where files go for a while: a disk with room for three states, no tmpfs.")]
Caches = Annotated[str, typer.Option("--cache", help="State of the page cache when a load begins: warm, cold or warm,cold.")]


@app.command()
def save(size: Size = "2.9GB", ranks: Ranks = 2, rounds: Rounds = 5, directory: Folder = ".", as_json: AsJson = False) -> None:
    """Durable saves of a GPT's FSDP2 and Adam state; each is loaded again and checked."""
    from shardckpt.bench import SaveSpec, measure_save, parse_size

    spec = SaveSpec(nbytes=parse_size(size), ranks=ranks, rounds=rounds)
    with _progress_shown(hidden=as_json) as show:
        report = measure_save(spec, directory, show)
    print_report(report, as_json)


@app.command()
def load(
    size: Size = "2.9GB",
    ranks: Ranks = 2,
    rounds: Rounds = 5,
    cache: Caches = "warm,cold",
    directory: Folder = ".",
    as_json: AsJson = False,
) -> None:
    """Loads by new processes onto the layout that was saved; each is checked."""
    from shardckpt.bench import LoadSpec, measure_load, parse_size

    spec = LoadSpec(nbytes=parse_size(size), ranks=ranks, rounds=rounds, caches=_caches(cache))
    with _progress_shown(hidden=as_json) as show:
        report = measure_load(spec, directory, show)
    print_report(report, as_json)


@app.command()
def reshard(
    size: Size = "2.9GB",
    from_ranks: Ranks = 2,
    to_ranks: Annotated[str, typer.Option(metavar="N,N", help="Numbers of processes that load.")] = "4,8",
    dim: Annotated[str, typer.Option(metavar="N,N", help="Dimensions that targets are sharded on: 0, 1 or 0,1.")] = "0",
    rounds: Rounds = 3,
    cache: Caches = "cold",
    directory: Folder = ".",
    as_json: AsJson = False,
) -> None:
    """Loads onto other world sizes and dimensions, and how much is read for them; each is checked."""
    from shardckpt.bench import ReshardSpec, measure_reshard, parse_size

    spec = ReshardSpec(
        nbytes=parse_size(size),
        ranks=from_ranks,
        to_ranks=_integers("--to-ranks", to_ranks),
        dims=_integers("--dim", dim),
        rounds=rounds,
        caches=_caches(cache),
    )
    with _progress_shown(hidden=as_json) as show:
        report = measure_reshard(spec, directory, show)
    print_report(report, as_json)


@app.command("async")
def asynchronous(
    size: Size = "200MB",
    ranks: Annotated[int, typer.Option(help="Processes that train.", min=1)] = 2,
    rounds: Rounds = 2,
    steps: Annotated[int, typer.Option(help="Training steps for each save, at least.", min=1)] = 2,
    saves: Annotated[int, typer.Option(help="Saves of a turn.", min=1)] = 3,
    samples: Annotated[int, typer.Option(help="Rows of tokens that a rank trains on in a step.", min=1)] = 1,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", "--contestants", metavar="GLOB", help="Only those that match, such as 'dcp-*'; several times."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: CUDA when each rank can have a GPU.")] = "auto",
    directory: Folder = ".",
    as_json: AsJson = False,
) -> None:
    """What saves cost training that goes on beside them; each checkpoint is loaded again and checked.

    Ends with status 1 when a contestant failed, or what it saved was not the state as of the call.
    """
    from shardckpt.bench import AsyncSpec, measure_async, parse_size

    spec = AsyncSpec(
        nbytes=parse_size(size),
        ranks=ranks,
        rounds=rounds,
        steps=steps,
        saves=saves,
        samples=samples,
        contestants=tuple(only or ()),
        device=_device(device),
    )
    with _progress_shown(hidden=as_json) as show:
        report = measure_async(spec, directory, show)
    if as_json:
        print_json(report)
    else:
        print_async(report)
    if any(line.wrong or line.problem for line in report.results):
        raise typer.Exit(FOUND)


@app.command("deepspeed")
def beside_deepspeed(
    size: Size = "1.212GB",
    ranks: Ranks = 4,
    to_ranks: Annotated[int, typer.Option(help="Processes that resume.", min=1)] = 2,
    rounds: Rounds = 3,
    directory: Folder = ".",
    as_json: AsJson = False,
) -> None:
    """DeepSpeed's engines: saves at ZeRO 1, 2 and 3, resumes on other numbers of ranks, imports; checked bit by bit.

    The default size is that of the masters and moments of 101 M parameters. DeepSpeed takes its turns; it has to be installed.
    """
    from shardckpt.bench import DeepSpeedSpec, measure_deepspeed, parse_size

    spec = DeepSpeedSpec(nbytes=parse_size(size), ranks=ranks, to_ranks=to_ranks, rounds=rounds)
    with _progress_shown(hidden=as_json) as show:
        report = measure_deepspeed(spec, directory, show)
    if as_json:
        print_json(report)
    else:
        print_deepspeed(report)


@app.command()
def restart(
    size: Size = "600MB",
    ranks: Annotated[int, typer.Option(help="Processes that train.", min=1)] = 2,
    rounds: Rounds = 3,
    directory: Folder = ".",
    as_json: AsJson = False,
) -> None:
    """From SIGKILL of a process to the first step after it, under torchrun: with a restore, and without checkpoints."""
    from shardckpt.bench import RestartSpec, measure_restart, parse_size

    spec = RestartSpec(nbytes=parse_size(size), ranks=ranks, rounds=rounds)
    with _progress_shown(hidden=as_json) as show:
        report = measure_restart(spec, directory, show)
    if as_json:
        print_json(report)
    else:
        print_restart(report)


@app.command()
def plan(
    ranks: Annotated[int, typer.Option(help="World size of the job that is simulated.", min=1)] = 1024,
    model: Annotated[str, typer.Option(help="llama-8b, llama-70b or llama-405b.")] = "llama-70b",
    rounds: Annotated[int, typer.Option(help="Times that all of it is done.", min=1)] = 3,
    peer: Annotated[bool, typer.Option("--peer", help="Try DCP's planner too; takes minutes for many ranks.")] = False,
    peer_ranks: Annotated[int, typer.Option(help="World size for DCP's planner.", min=1)] = 16,
    directory: Folder = ".",
    as_json: AsJson = False,
) -> None:
    """Planning a save, the manifest, and planning a load, for any number of ranks, simulated in one process."""
    from shardckpt.bench import PlanSpec, measure_planning

    spec = PlanSpec(ranks=ranks, model=model, rounds=rounds, peer_ranks=peer_ranks if peer else 0)
    with _progress_shown(hidden=as_json) as show:
        report = measure_planning(spec, directory, show)
    if as_json:
        print_json(report)
    else:
        print_planning(report)


def _integers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} {text!r} is not a list of integers such as 4,8") from None


def _device(text: str) -> Device:
    from shardckpt.bench.spec import DEVICES

    for device in DEVICES:
        if text == device:
            return device
    raise ConfigError(f"--device {text!r} is not one of {', '.join(DEVICES)}")


def _caches(text: str) -> tuple[Cache, ...]:
    from shardckpt.bench.spec import CACHES

    named = [part.strip() for part in text.split(",")]
    unknown = [name for name in named if name not in CACHES]
    if unknown:
        raise ConfigError(f"--cache {unknown[0]!r} is not one of {', '.join(CACHES)}")
    return tuple(cache for cache in CACHES if cache in named)


@contextmanager
def _progress_shown(*, hidden: bool) -> Iterator[Callable[[Step], None]]:
    """Shows on stderr how far the benchmark has come. A run that is terminated still removes its files."""

    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    columns = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = Console(file=sys.stderr)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with Progress(*columns, console=console, transient=True, disable=hidden or not console.is_terminal) as bar:
            task = bar.add_task("starting", total=None)
            yield lambda step: bar.update(task, completed=step.done, total=step.total, description=step.doing)
    finally:
        signal.signal(signal.SIGTERM, before)
