# SPDX-License-Identifier: Apache-2.0
"""``shardckpt run``: torchrun, with what checkpoints need handed to the script through the environment."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from shardckpt.environment import ANNOUNCE, ROOT, SIGNAL, TIMEOUT, default_timeout, parse_signals
from shardckpt.errors import ConfigError

from .output import complain

_SIGNALS_OF_TORCHRUN = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"
_OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Torchrun's agent otherwise has one store for all starts, without prefixes (torch 2.13): a rank of the next start may read the
address that a rank of the last one has left there, which refuses it, and the restart fails."""


class Front(TyperCommand):
    """A command that leaves what stands behind ``--`` alone, also where it looks like an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        ctx.obj = args[end + 1 :]
        return super().parse_args(ctx, args[:end])


def run(
    context: typer.Context,
    root: Annotated[str | None, typer.Option("--root", help="Where the checkpoints are, for Checkpointer().")] = None,
    timeout: Annotated[float | None, typer.Option("--timeout", help="Seconds that ranks wait for each other.")] = None,
    preempt: Annotated[
        str | None, typer.Option("--signal", help="What on_signal() waits for, such as SIGTERM or USR1; several with commas.")
    ] = None,
) -> None:
    """Run a script with torchrun: shardckpt run [OPTIONS] [OPTIONS OF TORCHRUN] -- SCRIPT ARGUMENTS

    All other options are torchrun's and passed on as they are: --nnodes 1:4, --nproc-per-node, --rdzv-id, --max-restarts and so
    on; with --nnodes MIN:MAX, nodes meet by c10d. At each start rank 0 prints the step and the number of ranks that it resumes from, and the number it goes on with. The
    exit status is that of the script, or 128 and the number of the signal that killed it.

    The script finds --root, --timeout and --signal in the environment variables SHARDCKPT_ROOT, SHARDCKPT_TIMEOUT and
    SHARDCKPT_SIGNAL, which Checkpointer(), Options() and on_signal() take where they are given nothing else. With these
    variables, torchrun itself does the same.

    What a killed start has left behind cannot save any more when the next one has begun, if --rdzv-id (or the environment
    variable SHARDCKPT_RUN) names the run.
    """
    if not context.obj:
        raise ConfigError("write -- before the script: shardckpt run --nproc-per-node 2 -- train.py ...")
    os.environ.update(handed_over(root, timeout, preempt))
    raise typer.Exit(launch([*context.args, *context.obj]))


def handed_over(root: str | None, timeout: float | None, preempt: str | None) -> dict[str, str]:
    """What the script gets to see."""
    names = {ANNOUNCE: os.environ.get(ANNOUNCE, "1"), _OWN_STORE: os.environ.get(_OWN_STORE, "1")}
    if root is not None:
        # ranks may run in another directory, but not where a URL says
        names[ROOT] = root if "://" in root else os.path.abspath(root)
    if timeout is not None:
        names[TIMEOUT] = f"{timeout:g}"
        default_timeout(names)
    if preempt is not None:
        parse_signals(preempt, "--signal")
        names[SIGNAL] = preempt
        # torchrun dies of signals that it is not told of, instead of passing them on
        names["PET_SIGNALS_TO_HANDLE"] = os.environ.get("PET_SIGNALS_TO_HANDLE", _handled(preempt))
    return names


def _handled(preempt: str) -> str:
    """The signals that torchrun is to pass on, by name."""
    more = (signal.Signals(number).name for number in parse_signals(preempt, SIGNAL))
    return ",".join(dict.fromkeys((*_SIGNALS_OF_TORCHRUN.split(","), *more)))


def launch(arguments: Sequence[str]) -> int:
    """Run torchrun with these arguments until the script ends; the exit status."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parsed = torchrun.parse_args(list(arguments))  # type: ignore[no-untyped-call]
    fewest, _, most = parsed.nnodes.partition(":")
    if parsed.rdzv_backend == "static" and most not in ("", fewest):
        # torchrun's own default waits for all nodes, and takes none in later
        parsed.rdzv_backend = "c10d"
    try:
        torchrun.run(parsed)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        complain(f"{error.name}: rank {rank} ended with status {failure.exitcode}; {failure.message}")
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0
