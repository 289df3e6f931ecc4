# SPDX-License-Identifier: Apache-2.0
"""Train with torchrun's elasticity while processes are killed, nodes die and come back, and the job grows and shrinks.

Each node is an agent of ``shardckpt run --nnodes 1:4`` on this machine, with one process that trains. When the job is over,
what each process has consumed is compared with the same training in one process that nothing happens to. The exit status is 1
when a step was lost, a sample was missed or came twice beyond the steps since the last save, or a loss or weight differs.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch.elastic_job import Job, Stuck
from launch.elastic_proof import TOLERANCE, Proof, Start, Unproven, prove_directory

NODES = 4

console = Console(highlight=False)


def play(job: Job, happens: list[str]) -> None:
    """What happens to the job; each event is added to ``happens`` for the start that follows."""

    def event(text: str) -> None:
        # of several starts after one event, the first ones are of those who met first
        happens.extend([""] * (job.begun() - len(happens)))
        happens.append(text)
        console.print(f"[bold]{text}[/]")

    event("two nodes come")
    job.join(0, 1)
    job.until_training(2)
    event("SIGKILL to a process")
    job.kill_worker(1)
    job.until_training(2)
    event("SIGKILL to a node, its agent and its process")
    job.kill_agent(0, workers=True)
    job.until_training(1)
    event("it comes back")
    job.join(0)
    job.until_training(2)
    event("two more nodes come")
    job.join(2, 3)
    job.until_training(4)
    event("a node is preempted: SIGTERM, it saves and leaves")
    job.preempt(2)
    job.until_training(3)
    console.print("[bold]the end[/]")
    job.end()
    job.begun()


def show(starts: list[Start], proof: Proof, happens: list[str]) -> None:
    """Print the life of the job."""
    table = Table("start", "because", "processes", "first step", "last step", "done again", title="What happened")
    for number, (start, again) in enumerate(zip(starts, proof.again, strict=True)):
        why = happens[number] if number < len(happens) else ""
        last = str(max(start.steps, default="-"))
        table.add_row(str(number), why, str(start.ranks), str(start.first), last, str(again) if number else "")
    console.print(table)
    table = Table("step", "processes", "undisturbed", "this job", "difference", title="Loss around each start")
    for before, start in pairwise(starts):
        for one, steps in ((before, sorted(before.steps)[-1:]), (start, sorted(start.steps)[:2])):
            for step in steps:
                expected, found = proof.losses[step], one.steps[step][0].loss
                table.add_row(str(step), str(one.ranks), f"{expected:.12f}", f"{found:.12f}", f"{found - expected:+.1e}")
        table.add_section()
    console.print(table)


def conclude(starts: list[Start], proof: Proof) -> None:
    """Print what was proven."""
    counts = ", ".join(str(start.ranks) for start in starts)
    console.print(f"[bold green]Proven[/], of {len(starts)} starts on {counts} processes:")
    for line in (
        f"nothing was lost: steps 1 to {proof.steps} were all done, and no start went back behind a step that was durable",
        f"nothing was seen twice beyond the steps since the last save: {sum(proof.again)} steps that no save had got were done "
        "again, with the same samples",
        f"each of the {proof.epochs} whole epochs consumed each sample once, in the order of an undisturbed run",
        f"each loss is that of the undisturbed run, to {proof.difference:.0e}; so are the last weights, to {TOLERANCE:.0e}",
    ):
        console.print(f"  - {line}", soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Play it, or look at what another job has left, and print what that proves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="an empty folder to work in, which is kept (default: a temporary one)")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="only prove a job of elastic_train.py that is over")
    args = parser.parse_args(arguments)
    begin = time.monotonic()
    happens: list[str] = []
    work = args.check or args.keep or Path(tempfile.mkdtemp(prefix="shardckpt-elastic-"))
    if args.keep:
        work.mkdir(parents=True, exist_ok=True)
        if any(work.iterdir()):
            parser.error(f"--keep {work}: the folder is not empty")
    try:
        if not args.check:
            job = Job(work.absolute(), lambda text: console.print(f"{time.monotonic() - begin:4.0f} s  {text}"), NODES)
            try:
                play(job, happens)
            finally:
                job.close()
        starts, proof = prove_directory(work)
    except (Stuck, Unproven) as error:
        console.print("[bold red]FAILED[/]:", escape(str(error)), soft_wrap=True)
        raise SystemExit(1) from None
    finally:
        if not args.keep and not args.check:
            shutil.rmtree(work, ignore_errors=True)
    show(starts, proof, happens)
    conclude(starts, proof)
    console.print(f"{time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
