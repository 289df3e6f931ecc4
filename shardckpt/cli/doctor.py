# SPDX-License-Identifier: Apache-2.0
"""``shardckpt doctor``: whether this machine is fit to save quickly and safely."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from shardckpt.errors import ConfigError
from shardckpt.store import open_store

from .arguments import AsJson
from .output import FOUND, print_json, print_table, say, size_text

if TYPE_CHECKING:
    from shardckpt.doctor import Diagnosis
    from shardckpt.gpu import GPU

_UNKNOWN = "-"
_SILENCE = logging.NullHandler()


def doctor(
    root: Annotated[
        str | None,
        typer.Argument(metavar="ROOT", help="Where checkpoints go; without it, what SHARDCKPT_ROOT says.", show_default=False),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            "--rdzv-endpoint",
            metavar="HOST[:PORT]",
            help="Where the nodes of a job find each other; without it, what PET_RDZV_ENDPOINT or MASTER_ADDR say.",
        ),
    ] = None,
    ranks_per_node: Annotated[
        int | None,
        typer.Option(
            "--nproc-per-node",
            min=1,
            help="Ranks that will run here; without it, LOCAL_WORLD_SIZE, or one for each GPU, or all that saved.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine: versions, host memory, GPUs, storage, and the rendezvous of a job.

    GPUs: their links, memory errors, the speed of staging. With ROOT: its file system, O_DIRECT, hard links, flushes, speed,
    and whether disk and host memory have room for one more checkpoint like the newest. With --rdzv-endpoint: whether it has an
    address, and can be reached or listened on from here.

    Run it where training will run: on each kind of node, in the container, with the same CPUs and GPUs. It takes a few seconds.
    For a moment it writes up to 256 MiB in ROOT, or in the directory above it while there is none.
    Each line that is not ok comes with what to do about it. The exit status is 1 when there is a problem.

    --json: {ok, gpus: [{uuid, index, name, bus_id, numa_node, cpus, link, max_link, memory_total, memory_free,
    uncorrected_errors}], checks: [{check, status, text, remedy, values}]}, with links as {generation, width}
    """
    from shardckpt.doctor import Machine, examine, parse_endpoint  # needs torch

    # what is no place and no endpoint at all is a mistake of who typed it, not of the machine
    if root is not None:
        _require_place(root)
    if endpoint is not None:
        parse_endpoint(endpoint)
    # what stores would log is among the findings
    logging.getLogger("shardckpt").addHandler(_SILENCE)
    with unwound_by_signals():
        diagnosis = examine(Machine.with_environment(root=root, endpoint=endpoint, ranks_per_node=ranks_per_node))
    report(diagnosis, as_json)


def _require_place(root: str) -> None:
    try:
        open_store(root)
    except ConfigError as error:
        # with a cause it is what the machine lacks
        if error.__cause__ is None:
            raise


@contextmanager
def unwound_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as an error does, so that what it has written is removed; not where they are ignored
    or handled already."""

    def end(number: int, _frame: object) -> None:
        for seen in taken:
            signal.signal(seen, signal.SIG_IGN)
        raise SystemExit(128 + number)

    taken = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def report(diagnosis: Diagnosis, as_json: bool) -> None:
    """Print what was found; ends with status 1 when there is a problem."""
    if as_json:
        print_json({"ok": diagnosis.ok, "gpus": diagnosis.gpus, "checks": diagnosis.findings})
    else:
        _print(diagnosis)
    if not diagnosis.ok:
        raise typer.Exit(FOUND)


def _print(diagnosis: Diagnosis) -> None:
    if diagnosis.gpus:
        columns = ("gpu", "name", "numa", "cpus", "link now", "link best", "limit/s", "free", "memory", "errors")
        numbers = ("numa", "limit/s", "free", "memory", "errors")
        print_table(columns, [_row(gpu) for gpu in diagnosis.gpus], numbers=numbers)
        say()
    rows = [(finding.check, finding.status, finding.text) for finding in diagnosis.findings]
    print_table(("check", "status", "value"), rows)
    advice = [finding for finding in diagnosis.findings if finding.remedy]
    if advice:
        say()
    for finding in advice:
        say(f"{finding.check}: {finding.remedy}")


def _row(gpu: GPU) -> tuple[str, ...]:
    from shardckpt.doctor.gpus import ranges

    limit = None if gpu.max_link is None else gpu.max_link.bytes_per_second
    known = (
        # one that torch may not use has no number
        gpu.bus_id if gpu.index is None else gpu.index,
        gpu.name,
        gpu.numa_node,
        ranges(gpu.cpus) or None,
        gpu.link,
        gpu.max_link,
        None if limit is None else size_text(int(limit)),
        None if gpu.memory_free is None else size_text(gpu.memory_free),
        None if gpu.memory_total is None else size_text(gpu.memory_total),
        gpu.uncorrected_errors,
    )
    return tuple(_UNKNOWN if value is None else str(value) for value in known)
