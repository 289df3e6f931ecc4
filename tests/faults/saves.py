# SPDX-License-Identifier: Apache-2.0
"""Small states, attempts to save and restore them on storage that fails, and what must hold of a root after each."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

import shardckpt
from shardckpt.coordinate import Coordinator
from shardckpt.errors import CheckpointError
from shardckpt.manifest import step_directory
from shardckpt.options import Options
from shardckpt.root import Root
from shardckpt.saving import Saver
from shardckpt.store import LocalStore
from tests.engine.stores import checkpointer, equal
from tests.faults.forks import PATIENCE
from tests.store.faults import FaultyFileSystem, failing, killing, shortened

ERRORS: Final = ("ENOSPC", "EDQUOT", "EIO", "EINTR")
KINDS: Final[dict[str, Callable[..., Any]]] = {
    **{name: failing(getattr(errno, name)) for name in ERRORS},
    "short": shortened,
    "kill": killing,
}
ALL: Final = os.environ.get("SHARDCKPT_FAULTS") == "all"
"""Whether each kind of error is tried at each call, which takes minutes."""
KEPT: Final = (1, 2)
"""The steps that a root has before anything goes wrong with it; as many are kept."""
NEXT: Final = 3
"""The step that is saved then."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong in one attempt."""

    call: int
    """With the storage call of this number, from 1."""
    kind: str
    """A key of `KINDS`."""
    lasting: bool = False
    """Whether all later calls fail too."""
    rank: int = 0
    """On this rank."""

    def on(self, fs: FaultyFileSystem) -> FaultyFileSystem:
        """Let it happen on ``fs``."""
        return fs.strike(self.call, KINDS[self.kind], lasting=self.lasting)


@dataclass(frozen=True, slots=True)
class Ended:
    """How an attempt ended on one rank that was not killed."""

    error: str
    """Type of the error; "" when it went well."""
    message: str
    """Of the error."""
    ranks: tuple[int, ...]
    """Those that the error says are missing."""
    unknown: bool
    """Whether the error says that the checkpoint may be committed."""
    struck: str
    """The storage call that was hit, with its path."""
    flushed_again: bool
    """Whether a descriptor was flushed again after that had failed."""

    @property
    def what(self) -> str:
        """The beginning of the message: what could not be done, and where."""
        return self.message.partition(":")[0]


def a_state(step: int, rank: int = 0) -> dict[str, Any]:
    """Three dtypes; other at each step, and in part on each rank."""
    return {
        "w": torch.arange(15, dtype=torch.float32).reshape(3, 5) * step,
        "half": torch.full((7,), step, dtype=torch.bfloat16),
        "own": shardckpt.PerRank(torch.tensor([step, rank], dtype=torch.int64)),
        "step": step,
    }


def check(root: Path) -> list[int]:
    """The committed steps, after a look at every value in them."""
    steps = Root(LocalStore(root)).steps()
    for step in steps:
        found = shardckpt.load(root / step_directory(step), options=Options(read_once="never", workers=1))
        own = {rank: a_state(step, rank)["own"].value for rank in range(found.info.world_size)}
        assert found.step == step
        assert equal(dict(found.state), a_state(step) | {"own": own}), f"step {step} is not what was saved"
    return steps


def make_root(root: Path) -> Path:
    """A root of one rank with the steps `KEPT`."""
    with checkpointer(root, FaultyFileSystem(), workers=1) as ckpt:
        for step in KEPT:
            ckpt.save(step, a_state(step), wait=True)
    return root


def copies(template: Path, count: int) -> list[Path]:
    """Roots like ``template``, each to be damaged in its own way."""
    return [Path(shutil.copytree(template, template.with_name(f"{template.name}-{number}"))) for number in range(count)]


def count_calls(attempt: Callable[[FaultyFileSystem], object]) -> list[str]:
    """The names of all storage calls that ``attempt`` makes when nothing goes wrong."""
    fs = FaultyFileSystem()
    attempt(fs)
    return fs.names()


def faults(calls: Sequence[str], kinds: Iterable[str], *, lasting: bool = False, rank: int = 0) -> list[Fault]:
    """Faults at each call: one of each kind with `ALL`, else errors take turns. Counts are short where bytes are counted."""
    found = []
    errors = [kind for kind in kinds if kind in ERRORS]
    for number, name in enumerate(calls, 1):
        found += [
            Fault(number, kind, lasting, rank) for kind in (errors if ALL else errors[number % max(1, len(errors)) :][:1])
        ]
        others = [kind for kind in kinds if kind not in ERRORS and (kind != "short" or name in ("pwrite", "preadv"))]
        found += [Fault(number, kind, lasting, rank) for kind in others]
    return found


def attempt(fs: FaultyFileSystem, act: Callable[[], object]) -> Ended:
    """Carry out ``act``, whose storage is ``fs``, and tell how it ended."""
    error: CheckpointError | None = None
    try:
        act()
    except CheckpointError as raised:
        error = raised
    details = error.details if error is not None else {}
    return Ended(
        error=type(error).__name__ if error is not None else "",
        message=error.message if error is not None else "",
        ranks=tuple(details.get("ranks", ())),
        unknown=details.get("outcome") == "unknown",
        struck=fs.struck,
        flushed_again=_flushed_again(fs),
    )


def save_next(root: Path, fs: FaultyFileSystem, *, wait: bool = True) -> None:
    """Save `NEXT`, as a run does that keeps so many steps that the oldest one goes."""
    with checkpointer(root, fs, keep_last=len(KEPT), workers=1, on_error="raise") as ckpt:
        ckpt.save(NEXT, a_state(NEXT), wait=wait).result(PATIENCE)


def save_together(coordinator: Coordinator, root: Path, fs: FaultyFileSystem, step: int = NEXT) -> None:
    """One rank's part of a save of several."""
    saver = Saver(coordinator, LocalStore(root, fs), Options(workers=1))
    saver.save(f"{step_directory(step)}/", step, a_state(step, coordinator.rank), {})


def restore_newest(root: Path, fs: FaultyFileSystem) -> int:
    """Restore in place, and look at every value; the step."""
    target = a_state(0)
    with checkpointer(root, fs, workers=1, read_once="never") as ckpt:
        restored = ckpt.restore(target)
    assert restored is not None
    wanted = a_state(restored.step)
    assert equal(target.pop("own").value, wanted.pop("own").value)
    assert equal(target, wanted)
    return restored.step


def recover(root: Path, fs: FaultyFileSystem | None = None) -> int:
    """What a run does that is started again: restore the newest step, go on by one, save. The new step."""
    fs = fs or FaultyFileSystem()
    step = restore_newest(root, fs) + 1
    with checkpointer(root, fs, keep_last=len(KEPT), workers=1) as ckpt:
        ckpt.save(step, a_state(step), wait=True)
    return step


def _flushed_again(fs: FaultyFileSystem) -> bool:
    """Whether the descriptor of which a flush failed was flushed once more before it was closed."""
    if not fs.struck.startswith("fsync "):
        return False
    fd = fs.calls[fs.struck_at - 1][1][0]
    after = [name for name, args in fs.calls[fs.struck_at :] if args[0] == fd]
    return "fsync" in after[: after.index("close")]
