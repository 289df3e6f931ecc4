# SPDX-License-Identifier: Apache-2.0
"""What ``launch/elastic_train.py`` has written down proves, or does not: nothing lost, nothing twice, the same losses.

A job has *starts*, one after the other, each on a number of ranks of its own. A step counts as the last start did it that came
to it: what an earlier one did after its last save was lost with it, and is done again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import shardckpt
from launch.elastic_train import BATCH, SAMPLES, build, gradients

ROOT = "run"
"""Where the checkpoints are, in the directory of the job."""
TOLERANCE = 1e-9
"""Of losses and weights: the order in which ranks are summed changes the last bits."""


class Unproven(Exception):
    """The job did not do what it had to do."""


class Part(NamedTuple):
    """What one rank did of one step."""

    loss: float
    """Of the whole batch."""
    samples: list[int]
    """This rank's share of the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start of the job."""

    ranks: int
    """Processes."""
    first: int
    """The step that it began with."""
    steps: dict[int, list[Part]]
    """What the ranks did that came to the end of a step, by step."""
    saved: list[int]
    """The steps that rank 0 was told to be durable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What was proven of a job."""

    steps: int
    """How many there were, from 1 on."""
    epochs: int
    """Those that are complete."""
    again: list[int]
    """How many steps each start did that an earlier one had done."""
    unsaved: list[int]
    """How many steps after the last one that was reported as durable had been done when each start began."""
    losses: dict[int, float]
    """Of the undisturbed run, by step."""
    difference: float
    """The largest relative difference of a loss from that of the undisturbed run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The same training in one process that nothing happens to, without checkpoints."""

    steps: dict[int, Part]
    """Loss and the whole batch, by step."""
    weights: dict[str, torch.Tensor]
    """Of the model after the last step."""


def begun(directory: Path) -> int:
    """How many starts a job has had so far."""
    return len(list(directory.glob("start-*")))


def read_start(directory: Path, number: int) -> Start:
    """What one start has done so far."""
    told = json.loads((directory / f"start-{number}").read_text())
    steps: dict[int, list[Part]] = {}
    saved: list[int] = []
    for rank in range(told["ranks"]):
        file = directory / f"steps-{number}-{rank}"
        # the last line may be on its way
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        for entry in map(json.loads, lines):
            if "step" in entry:
                steps.setdefault(entry["step"], []).append(Part(entry["loss"], entry["samples"]))
            elif rank == 0:
                saved.append(entry["saved"])
    return Start(ranks=told["ranks"], first=told["first"], steps=steps, saved=saved)


def read(directory: Path) -> list[Start]:
    """All starts of a job so far."""
    return [read_start(directory, number) for number in range(begun(directory))]


def undisturbed(steps: int) -> Reference:
    """Train so many steps at once."""
    torch.set_num_threads(1)
    model, optimizer = build()
    sampler = shardckpt.ElasticSampler(SAMPLES, BATCH, seed=1, rank=0, world_size=1)
    found = {}
    for step, batch in zip(range(1, steps + 1), sampler.track(sampler, repeat=True), strict=False):
        found[step] = Part(gradients(model, batch).item(), batch)
        optimizer.step()
    return Reference(steps=found, weights={name: tensor.detach().clone() for name, tensor in model.state_dict().items()})


def prove(starts: list[Start], reference: Reference) -> Proof:
    """Compare what the starts did with the undisturbed run; raises `Unproven` with the first thing that is wrong."""
    done: dict[int, list[Part]] = {}
    again, unsaved = [], []
    durable, difference = 0, 0.0
    for number, start in enumerate(starts):
        newest = max(done, default=0)
        if start.first <= durable:
            raise Unproven(f"start {number} began with step {start.first}, although step {durable} was reported as durable")
        if start.first > newest + 1:
            raise Unproven(f"start {number} began with step {start.first}, but the ones before had come to {newest} only")
        again.append(newest + 1 - start.first)
        unsaved.append(newest - durable)
        difference = max([difference, *(_compare_losses(number, start, reference))])
        done.update(start.steps)
        durable = max([durable, *start.saved])
    if sorted(done) != sorted(reference.steps):
        raise Unproven(f"{len(done)} steps were done, and not 1 to {max(reference.steps, default=0)}, each of them")
    _compare_samples(done, reference)
    losses = {step: part.loss for step, part in reference.steps.items()}
    epochs = len(done) * BATCH // SAMPLES
    return Proof(steps=len(done), epochs=epochs, again=again, unsaved=unsaved, losses=losses, difference=difference)


def _compare_losses(number: int, start: Start, reference: Reference) -> list[float]:
    """The relative difference of each loss, also where a step was done again later."""
    found = []
    for step, parts in start.steps.items():
        if step not in reference.steps:
            continue
        expected = reference.steps[step].loss
        for part in parts:
            found.append(abs(part.loss - expected) / expected)
            # also where it is not a number
            if not found[-1] <= TOLERANCE:
                raise Unproven(f"the loss of step {step} in start {number} is {part.loss}, undisturbed it is {expected}")
    return found


def _compare_samples(done: dict[int, list[Part]], reference: Reference) -> None:
    for step, expected in reference.steps.items():
        found = sorted(sample for part in done[step] for sample in part.samples)
        if found != sorted(expected.samples):
            raise Unproven(f"step {step} consumed the samples {found}, undisturbed it is {sorted(expected.samples)}")
    # by itself, whatever the order is
    order = [sample for step in sorted(done) for part in done[step] for sample in part.samples]
    for begin in range(0, len(order) - SAMPLES + 1, SAMPLES):
        if sorted(order[begin : begin + SAMPLES]) != list(range(SAMPLES)):
            raise Unproven(f"epoch {begin // SAMPLES} did not consume each sample once")


def compare_weights(root: Path, reference: Reference) -> None:
    """The newest checkpoint holds the weights of the undisturbed run after its last step; raises `Unproven`."""
    last = max(reference.steps)
    with shardckpt.Checkpointer(root) as ckpt:
        newest = max(ckpt.steps(), default=0)
    if newest != last:
        raise Unproven(f"the newest checkpoint is of step {newest}, not of the last one, {last}")
    state = shardckpt.load(root / f"step-{newest:08}").state
    for name, expected in reference.weights.items():
        found = state["model"][name]
        if not torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE):
            raise Unproven(
                f"{name} of step {newest} differs by {(found - expected).abs().max().item()} from the undisturbed run"
            )


def prove_directory(directory: Path) -> tuple[list[Start], Proof]:
    """All of it for a job that is over; raises `Unproven`."""
    starts = read(directory)
    last = max((step for start in starts for step in start.steps), default=0)
    if last == 0:
        raise Unproven(f"no step was done in {directory}")
    reference = undisturbed(last)
    proof = prove(starts, reference)
    compare_weights(directory / ROOT, reference)
    return starts, proof
