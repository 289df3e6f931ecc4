# SPDX-License-Identifier: Apache-2.0
"""``shardckpt rendezvous``: where the agents of an elastic job meet, beside the job, so that it outlives each of its nodes."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from .output import say


def rendezvous(
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port, of all addresses; 0 for a free one.")] = 29400,
) -> None:
    """Hold the store at which the agents of elastic jobs meet, until SIGTERM or SIGINT come.

    By itself, torchrun has it in the agent of one node, and the end of that node is the end of the job. For agents to meet
    here, start them with --rdzv-endpoint=HOST:29400 --rdzv-conf=is_host=0. Several jobs may, each under a --rdzv-id of its own;
    one that came to its end is over, and the next one needs another.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not list it

    ends = {signal.SIGTERM, signal.SIGINT}
    # before there are threads, which would get them otherwise; and a container would ignore SIGTERM to its first process
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    try:
        store = TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    except RuntimeError as error:
        raise OSError(f"cannot listen at port {port}: {str(error).splitlines()[0]}") from None
    say(f"agents can meet at port {store.port}")
    signal.sigwait(ends)
