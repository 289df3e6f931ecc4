# SPDX-License-Identifier: Apache-2.0
"""``shardckpt run``: torchrun, with what checkpoints need handed to the script through the environment."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from shardckpt.environment import (
    ANNOUNCE,
    NAMELESS,
    ROOT,
    RUN,
    SIGNAL,
    TIMEOUT,
    default_signals,
    default_timeout,
    parse_signals,
)
from shardckpt.errors import ConfigError
from shardckpt.meeting import check_timeout

from .output import FOUND, complain

_SIGNALS_OF_TORCHRUN = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"
_PASSED_ON = "PET_SIGNALS_TO_HANDLE"
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

    All other options are torchrun's and passed on as they are: --nnodes, --nproc-per-node, --max-restarts and so on. With
    --nnodes MIN:MAX, nodes meet by c10d. At each start rank 0 prints the step and the number of ranks that it resumes from, and
    the number it goes on with. The exit status is that of the script, 128 and the number of the signal that killed it, or the
    same for a signal that was sent to this command.

    The script finds --root, --timeout and --signal in the environment variables SHARDCKPT_ROOT, SHARDCKPT_TIMEOUT and
    SHARDCKPT_SIGNAL, which Checkpointer(), Options() and on_signal() take where they are given nothing else. A last save on a
    signal has 30 s, or what --shutdown-timeout says.

    What a killed start has left behind cannot save any more when the next one of the same run has begun. The name of the run is
    SHARDCKPT_RUN, or else --rdzv-id, or else one for all that uses the root. So start what uses it beside the run, such as an
    evaluation, with SHARDCKPT_RUN=none.

    A process that dies, or leaves on a signal to another node, is one of --max-restarts for each agent whose processes end with
    it. The agent at --rdzv-endpoint is the only one whose loss ends the job; `shardckpt rendezvous` takes its place.
    """
    if not context.obj:
        raise ConfigError("write -- before the script: shardckpt run --nproc-per-node 2 -- train.py ...")
    os.environ.update(handed_over(root, timeout, preempt))
    raise typer.Exit(launch([*context.args, *context.obj]))


def handed_over(
    root: str | None, timeout: float | None, preempt: str | None, environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """What the script and torchrun get to see, beside what they do."""
    names = {ANNOUNCE: environ.get(ANNOUNCE, "1"), _OWN_STORE: environ.get(_OWN_STORE, "1")}
    if root is not None:
        # ranks may run in another directory, but not where a URL says
        names[ROOT] = root if "://" in root else os.path.abspath(root)
    if timeout is not None:
        names[TIMEOUT] = f"{timeout:g}"
    if preempt is not None:
        parse_signals(preempt, "--signal")
        names[SIGNAL] = preempt
    seen = {**environ, **names}
    check_timeout(default_timeout(seen))
    if signals := [signal.Signals(number).name for number in default_signals(seen)]:
        # torchrun dies of signals that it is not told of, instead of passing them on
        handled = environ.get(_PASSED_ON, _SIGNALS_OF_TORCHRUN).split(",")
        names[_PASSED_ON] = ",".join(dict.fromkeys([*handled, *signals]))
    return names


def name_of_run(rdzv_id: str, environ: Mapping[str, str]) -> str:
    """The name by which the starts of a run know each other, where none is given: torchrun makes up a new one each time when
    there is one node only. "" where nothing is known that they have in common.
    """
    if environ.get(RUN):
        return environ[RUN]
    if rdzv_id not in NAMELESS:
        return rdzv_id
    return "run" if environ.get(ROOT) else ""


def launch(arguments: Sequence[str]) -> int:
    """Run torchrun with these arguments until the script ends; the exit status."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    parsed = torchrun.parse_args(list(arguments))  # type: ignore[no-untyped-call]
    fewest, _, most = parsed.nnodes.partition(":")
    if parsed.rdzv_backend == "static" and most not in ("", fewest):
        # torchrun's own default waits for all nodes, and takes none in later
        parsed.rdzv_backend = "c10d"
    if name := name_of_run(parsed.rdzv_id, os.environ):
        os.environ[RUN] = name
    try:
        torchrun.run(parsed)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        complain(f"{error.name}: rank {rank} ended with status {failure.exitcode}; {failure.message}")
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    except RendezvousError as error:
        why = str(error) or type(error).__name__
        complain(f"this agent cannot meet the others at {parsed.rdzv_endpoint or 'this host'}: {why}")
        return FOUND
    return 0
