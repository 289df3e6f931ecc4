# SPDX-License-Identifier: Apache-2.0
"""Looks at what a power cut has left with the engine itself, and says which promise is broken, if one is."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch

import shardckpt
from shardckpt.errors import CheckpointError
from shardckpt.store import LocalStore, Store
from shardckpt.store.publish import Publisher
from tests.power.crash import Crash, Image, after
from tests.power.disk import REPORTED, Disk, Moment

ROOT: Final = "/disk/runs/a"
"""Where checkpoints are kept; of what is above it, only "/disk" is there when a world begins."""
OPTIONS: Final = shardckpt.Options(background="thread", workers=1, timeout=60)
"""One thread writes, so that a run is the same each time."""
NEXT: Final = 90
"""The step that is saved after a power cut."""
_TENSORS: Final = {"a": 1100, "b": 900, "c": 700, "d": 300}
MOST_IMAGES: Final = 20_000
"""Images of one moment that are all looked at."""


class Checkpointer(shardckpt.Checkpointer):
    """Its root is on the disk that `checkpointer` was given."""

    disk: Disk

    @classmethod
    def _open_store(cls, url: str | os.PathLike[str]) -> Store:
        return store(cls.disk)


def store(disk: Disk) -> LocalStore:
    """The root on ``disk``. Nobody waits for the claim of a process that has died."""
    return LocalStore(ROOT, disk, Publisher(disk, patience=0.0))


def checkpointer(disk: Disk, **arguments: Any) -> shardckpt.Checkpointer:
    """A checkpointer of the root on ``disk``."""
    kind = type("Checkpointer", (Checkpointer,), {"disk": disk})
    return kind(ROOT, options=OPTIONS, **arguments)


def state(step: int) -> dict[str, Any]:
    """What is saved as ``step``: three blocks of data, in tensors that several ranks can share out."""
    return {name: torch.arange(count, dtype=torch.float32) * (step + 1) for name, count in _TENSORS.items()} | {"step": step}


def empty_state() -> dict[str, Any]:
    """What a state is restored into."""
    return {name: torch.full((count,), -1.0) for name, count in _TENSORS.items()} | {"step": -1}


@dataclass(frozen=True)
class Found:
    """What there is in an image."""

    steps: frozenset[int]
    """Those that were listed."""
    problem: str = ""
    """The promise that is broken, whatever was reported before."""


@dataclass
class Judge:
    """Judges images; each only once, however many moments can leave it."""

    links: bool = True
    """Whether the disk has hard links."""
    saves_again: bool = True
    """Whether to try a save on each image, too."""
    tried: int = 0
    """States that were judged, in all moments together."""
    known: dict[Image, Found] = field(default_factory=dict)
    outlines: dict[frozenset[tuple[str, int]], str] = field(default_factory=dict)
    """What came of a save on images of the same names and sizes."""

    def first_problem(self, moments: Iterable[Moment], chance: random.Random | None = None, samples: int = 0) -> str | None:
        """The first promise that a power cut breaks at one of these moments; all states are tried, or so many samples."""
        unsettled = None
        for number, moment in enumerate(moments):
            images = list(self._images(Crash(moment), chance, samples))
            for image in images:
                self.tried += 1
                problem = self.problem(image, moment.promises)
                if problem:
                    return f"after system call {number} ({moment.call}): {problem}; left was {describe(image)}"
            if moment.call == REPORTED and len(set(images)) > 1:
                differing = frozenset.union(*images) - frozenset.intersection(*images)
                unsettled = unsettled or f"P3: after success was reported, a power cut can still change {describe(differing)}"
        return unsettled

    def _images(self, crash: Crash, chance: random.Random | None, samples: int) -> Iterator[Image]:
        if chance is not None:
            return crash.sample(chance, samples)
        count = crash.count()
        if count > MOST_IMAGES:
            raise AssertionError(f"{count} states after one {crash.moment.call}: too many to try them all")
        return crash.images()

    def problem(self, image: Image, promises: Iterable[frozenset[int]]) -> str:
        """The promise that is broken if this is left; empty if none is."""
        found = self.known.get(image)
        if found is None:
            found = self.known[image] = self._look(image)
        lost = [promise for promise in promises if not promise & found.steps]
        if lost and not found.problem:
            return f"P3: of the steps {sorted(lost[0])}, of which one had to be there, none is; there are {sorted(found.steps)}"
        return found.problem

    def _look(self, image: Image) -> Found:
        disk = after(image, self.links)
        try:
            with checkpointer(disk) as ckpt:
                steps = frozenset(ckpt.steps())
                for step in steps:
                    problem = _restore(ckpt, step, step)
                    if problem:
                        return Found(steps, f"P1: step {step} is listed, and {problem}")
                newest = _restore(ckpt, None, max(steps, default=None))
                if newest:
                    return Found(steps, f"P1: of the newest step, {newest}")
        except CheckpointError as error:
            return Found(frozenset(), f"P1: the root cannot be looked at: {error}")
        if not self.saves_again:
            return Found(steps)
        # What is in files that no manifest names is not looked at, so names and sizes make a difference, and nothing else does.
        outline = frozenset((path, -1 if content is None else len(content)) for path, content in image)
        if outline not in self.outlines:
            self.outlines[outline] = self._save_again(image, steps)
        return Found(steps, self.outlines[outline])

    def _save_again(self, image: Image, steps: frozenset[int]) -> str:
        """What is wrong if training goes on, and saves the step after the newest one that is there, and a later one."""
        # The claim of a process that has died while it published without hard links is for a person to remove.
        disk = after(frozenset(node for node in image if not node[0].endswith(".claim.tmp")), self.links)
        for step in (max(steps, default=0) + 1, NEXT):
            try:
                with checkpointer(disk, keep_last=1) as ckpt:
                    ckpt.save(step, state(step), wait=True)
                    problem = _restore(ckpt, None, step)
                    listed = ckpt.steps()
            except CheckpointError as error:
                return f"the next save fails: {error}"
            if problem or listed != [step]:
                return f"the next save, of step {step}, has left the steps {listed}; {problem}"
        return ""


def _restore(ckpt: shardckpt.Checkpointer, step: int | None, expected: int | None) -> str:
    """What is wrong with a step; with the newest one, if it is None."""
    target = empty_state()
    try:
        restored = ckpt.restore(target, step=step)
    except CheckpointError as error:
        return f"does not load: {type(error).__name__}: {error}"
    if expected is None:
        return "" if restored is None else f"step {restored.step} came out of nothing"
    wrong = [name for name, value in state(expected).items() if not bool((torch.as_tensor(target[name]) == value).all())]
    return f"holds other values in {wrong}" if wrong else ""


def describe(image: Image) -> str:
    """An image in words, for a message."""
    return ", ".join(f"{path} ({'directory' if content is None else len(content)})" for path, content in sorted(image, key=str))
