# SPDX-License-Identifier: Apache-2.0
"""Train on 4 processes, kill them, go on with 2, kill those, finish on 3; print what that proves.

The same job also runs once from start to end on 4 processes, for comparison. The exit status is 1 when a tensor was not
restored bit for bit, or when the loss after a resume is not the one of the uninterrupted run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

TRAIN = Path(__file__).with_name("train_gpt.py")
# what train_gpt.py prints on rank 0
STEP = re.compile(r"step (\d+) loss (\S+) in")
TRANSFER = re.compile(r"(saved|restored) step (\d+): (\d+) bytes in (\S+) s")
# Another number of ranks adds the same gradients in another order, so losses agree to rounding, which training amplifies.
LOSS_TOLERANCE = 0.005
JOB_DEADLINE = 900.0

console = Console()


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One save or restore."""

    what: str
    """``saved`` or ``restored``."""
    step: int
    """Step of the checkpoint."""
    ranks: int
    """Processes that took part."""
    nbytes: int
    """Bytes written or read, by all ranks."""
    seconds: float
    """From the call to the durable checkpoint, or to the filled target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """Digests of a checkpoint, which do not depend on how it was sharded."""

    tensors: dict[str, str]
    """Digest of each tensor."""
    digest: str
    """Digest of all of them."""


@dataclass(slots=True, kw_only=True)
class Leg:
    """One start of the training job."""

    ranks: int
    """Processes."""
    kill_after: int | None = None
    """The step after which every process gets SIGKILL; None when the job runs to its end."""
    resumes: bool = False
    """Whether it goes on from a checkpoint, and saves the state once more as soon as it was restored."""
    losses: dict[int, float] = field(default_factory=dict)
    """Loss by step, filled by `run`."""
    transfers: list[Transfer] = field(default_factory=list)
    """Saves and restores, filled by `run`."""
    found: Content | None = None
    """Content of the state as this leg restored it, if it did."""
    left: Content | None = None
    """Content of the newest checkpoint at the end of this leg."""


def fail(message: str) -> NoReturn:
    """Say what went wrong, and end with status 1."""
    console.print(f"[bold red]FAILED[/]: {message}")
    raise SystemExit(1)


def kill_all(launcher: subprocess.Popen[str]) -> int:
    """SIGKILL the workers of a torchrun, then torchrun itself; returns how many workers there were."""
    try:
        processes = psutil.Process(launcher.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        processes = []
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    launcher.kill()
    psutil.wait_procs(processes, timeout=30)
    return len(processes)


def copy_of(leg: Leg, root: Path) -> Path:
    """Where a leg that resumes saves the state once more."""
    return root.with_name(f"restored-on-{leg.ranks}")


def run(leg: Leg, root: Path, options: list[str], log: Path, progress: Progress, bar: TaskID) -> None:
    """Run one leg under torchrun, and read its losses and transfers from what it prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={leg.ranks}", str(TRAIN)]
    command += [f"--root={root}", *options]
    if leg.resumes:
        command.append(f"--copy-to={copy_of(leg, root)}")
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    launcher = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    watchdog = threading.Timer(JOB_DEADLINE, kill_all, [launcher])
    watchdog.start()
    killed = False
    try:
        assert launcher.stdout is not None
        with log.open("a") as copy:
            for line in launcher.stdout:
                copy.write(line)
                if found := STEP.match(line):
                    step, loss = int(found[1]), float(found[2])
                    leg.losses[step] = loss
                    progress.update(bar, completed=step, loss=f"loss {loss:.4f}")
                    if step == leg.kill_after:
                        workers = kill_all(launcher)
                        killed = True
                        progress.console.print(f"  step {step}: [red]SIGKILL[/] to all {workers} workers")
                elif found := TRANSFER.match(line):
                    transfer = Transfer(
                        what=found[1], step=int(found[2]), ranks=leg.ranks, nbytes=int(found[3]), seconds=float(found[4])
                    )
                    leg.transfers.append(transfer)
                    progress.console.print(f"  {transfer.what} step {transfer.step} on {leg.ranks} ranks")
        status = launcher.wait()
    finally:
        watchdog.cancel()
        kill_all(launcher)
    if killed != (leg.kill_after is not None) or (status != 0 and not killed):
        console.print(log.read_text()[-6000:], markup=False, highlight=False)
        fail(f"the training job on {leg.ranks} ranks ended with status {status}; the end of {log} is above")


def newest_in(root: Path) -> Path:
    """The newest checkpoint, which the killed job may not have come to print."""
    committed = [manifest.parent for manifest in root.glob("step-*/manifest.json")]
    if not committed:
        fail(f"the killed job has left no checkpoint in {root}")
    return max(committed)


def content_of(checkpoint: Path) -> Content:
    """What ``shardckpt digest`` says of a checkpoint."""
    command = [sys.executable, "-m", "shardckpt", "digest", str(checkpoint), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=JOB_DEADLINE)
    if done.returncode != 0:
        fail(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr}")
    answer = json.loads(done.stdout)
    return Content(tensors=answer["tensors"], digest=answer["digest"])


def train_all(args: argparse.Namespace, work: Path) -> tuple[Leg, list[Leg]]:
    """The uninterrupted run, and the legs of the interrupted one."""
    every, steps = args.save_every, args.steps
    reference = Leg(ranks=4)
    legs = [
        Leg(ranks=4, kill_after=steps // 3 + every // 2),
        Leg(ranks=2, kill_after=2 * steps // 3 + every // 2, resumes=True),
        Leg(ranks=3, resumes=True),
    ]
    options = [f"--steps={steps}", f"--save-every={every}", f"--seed={args.seed}"]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for name, group in (("uninterrupted", [reference]), ("interrupted", legs)):
            bar = progress.add_task(name, total=steps, loss="")
            for leg in group:
                progress.console.print(f"[bold]{name} run[/], {leg.ranks} processes")
                run(leg, work / name, options, work / f"{name}.log", progress, bar)
                if leg.resumes:
                    leg.found = content_of(copy_of(leg, work / name))
                if leg.kill_after:
                    leg.left = content_of(newest_in(work / name))
    return reference, legs


def compare_losses(reference: Leg, legs: list[Leg]) -> None:
    """Print the losses around each resume beside those of the uninterrupted run; fail when they differ."""
    table = Table("step", "processes", "uninterrupted", "interrupted", "difference", title="Loss")
    worst = 0.0

    def row(leg: Leg, step: int) -> None:
        nonlocal worst
        expected, got = reference.losses[step], leg.losses[step]
        worst = max(worst, abs(got - expected))
        table.add_row(str(step), str(leg.ranks), f"{expected:.6f}", f"{got:.6f}", f"{got - expected:+.6f}")

    for before, leg in pairwise(legs):
        restored = min(leg.losses) - 1
        for step in (restored - 1, restored):
            row(before, step)
        table.add_section()
        for step in range(restored + 1, restored + 4):
            row(leg, step)
        table.add_row("...")
    row(legs[-1], max(legs[-1].losses))
    console.print(table)
    if worst > LOSS_TOLERANCE:
        fail(f"the losses differ by {worst:.6f}, more than {LOSS_TOLERANCE}; the state was not restored as it was")


def compare_content(legs: list[Leg]) -> None:
    """Print whether each tensor restored on another number of processes is the one that was saved; fail if not."""
    table = Table("checkpoint", "processes", "tensors", title="Content as saved and as restored")
    table.add_column("digest of all", overflow="fold")
    wrong: set[str] = set()
    for before, leg in pairwise(legs):
        if not before.left or not leg.found:
            fail("the digests of a resume are not known")
        saved, found = before.left, leg.found
        differ = {name for name in saved.tensors | found.tensors if saved.tensors.get(name) != found.tensors.get(name)}
        wrong |= differ
        table.add_row(f"step {min(leg.losses) - 1} as saved", str(before.ranks), str(len(saved.tensors)), saved.digest)
        table.add_row("as restored", str(leg.ranks), f"{len(found.tensors.keys() - differ)} equal", found.digest)
        table.add_section()
    console.print(table)
    if wrong:
        fail(f"{len(wrong)} tensors were not restored bit for bit: {', '.join(sorted(wrong)[:10])}")


def show_transfers(reference: Leg, legs: list[Leg]) -> None:
    """Print size, time and speed of each save and restore."""
    table = Table("", "step", "processes", "bytes", "seconds", "GB/s", title="Saves and restores")
    for leg in (reference, *legs):
        for transfer in leg.transfers:
            table.add_row(
                transfer.what,
                str(transfer.step),
                str(leg.ranks),
                f"{transfer.nbytes:,}",
                f"{transfer.seconds:.3f}",
                f"{transfer.nbytes / transfer.seconds / 1e9:.2f}",
            )
        table.add_section()
    console.print(table)


def main() -> None:
    """Run both jobs and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=48, help="training steps (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=8, help="steps between saves (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="an empty folder to work in, which is kept (default: a temporary one)")
    args = parser.parse_args()
    if args.steps < 6 * args.save_every or args.save_every < 2:
        parser.error("--save-every must be at least 2, and --steps at least six times as much")
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
        if any(args.keep.iterdir()):
            parser.error(f"--keep {args.keep}: the folder is not empty")
    work = args.keep or Path(tempfile.mkdtemp(prefix="shardckpt-quickstart-"))
    begin = time.monotonic()
    try:
        reference, legs = train_all(args, work)
        show_transfers(reference, legs)
        compare_losses(reference, legs)
        compare_content(legs)
    finally:
        if not args.keep:
            shutil.rmtree(work, ignore_errors=True)
    console.print(
        "[bold green]All of it holds[/]: what was saved on 4 processes was restored on 2, and from there on 3, bit for bit, "
        f"and training went on as if nothing had happened. {time.monotonic() - begin:.0f} s"
    )


if __name__ == "__main__":
    main()
