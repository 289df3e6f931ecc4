# SPDX-License-Identifier: Apache-2.0
"""The program: its commands, its version, and what becomes of errors."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from shardckpt import CheckpointError, ConfigError, __version__

from .diff import diff
from .digest import digest
from .doctor import doctor
from .export import export
from .import_ import import_
from .ls import ls
from .output import FOUND, USAGE, complain, say
from .prune import prune
from .rendezvous import rendezvous
from .repair import repair
from .run import Front, run
from .show import show
from .verify import verify

LICENSE = "Apache-2.0"


class Commands(TyperGroup):
    """Commands whose errors are one line on stderr and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CheckpointError as error:
            complain(error.message)
            raise typer.Exit(USAGE if isinstance(error, ConfigError) else FOUND) from None
        except BrokenPipeError:
            # whoever reads has seen enough, which typer knows
            raise
        except OSError as error:
            complain(str(error))
            raise typer.Exit(FOUND) from None


class LateBench(TyperGroup):
    """The commands of ``bench``, which are imported when they are asked for: they need torch, which takes seconds."""

    def list_commands(self, ctx: Any) -> list[str]:
        return self._commands().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return self._commands().get_command(ctx, cmd_name)

    def _commands(self) -> TyperGroup:
        from .bench import app as bench

        return typer.main.get_group(bench)


app = typer.Typer(
    name="shardckpt",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 all is well; 1 a problem or a difference was found, or the command failed; 2 wrong usage.",
)
for command in (ls, show, verify, repair, digest, diff, prune, doctor):
    app.command()(command)
app.command(cls=Front, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})(run)
app.command()(rendezvous)

app.add_typer(import_, name="import", help="Read checkpoints of other programs.")
app.add_typer(export, name="export", help="Write a checkpoint as files of other programs.")
app.add_typer(
    typer.Typer(cls=LateBench, no_args_is_help=True),
    name="bench",
    help="Measure speed on this machine, beside torch.distributed.checkpoint (DCP) and the raw disk.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            torch = importlib.metadata.version("torch")
        except importlib.metadata.PackageNotFoundError:
            torch = "is not installed"
        for line in (f"shardckpt {__version__}", f"license {LICENSE}", f"torch {torch}"):
            say(line)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the versions and the license."),
    ] = False,
) -> None:
    """Look at, verify, repair, compare and prune checkpoints of shardckpt, read and write those of other programs, run what
    makes them, and check the machines for it."""


def cli_main(arguments: Sequence[str] | None = None) -> None:
    """Run the program ``shardckpt``, with the arguments of the process unless others are given; ends with SystemExit, whose
    ``code`` is the exit status: 0, or 1 when a problem or a difference was found or the command failed, or 2 for wrong usage.
    """
    app(args=arguments, prog_name="shardckpt")
