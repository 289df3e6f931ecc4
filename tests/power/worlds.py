# SPDX-License-Identifier: Apache-2.0
"""Small runs of the engine on a disk that loses its power: what is done, and what was promised when."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Final

from shardckpt.commit import find_committed
from shardckpt.events import Timings
from shardckpt.manifest import MANIFEST_NAME, step_directory
from shardckpt.options import Retention
from shardckpt.pruning import Pruner
from shardckpt.root import Root
from shardckpt.saving import Saver
from shardckpt.store import ALIGNMENT, LocalStore
from tests.power.disk import Disk
from tests.power.flushes import Flush
from tests.power.judge import OPTIONS, ROOT, checkpointer, state, store
from tests.power.turns import Turns, coordinators
from tests.store.faults import Killed
from tests.store.helpers import some_bytes, store_file, write

World = Callable[[Disk], None]
"""Does something on a disk, and makes it promise what the engine has reported."""


def saves(disk: Disk) -> None:
    """Two steps, in a new root below a new directory."""
    with checkpointer(disk) as ckpt:
        ckpt.save(1, state(1), wait=True)
        disk.report({1})
        ckpt.save(2, state(2), wait=True)
        disk.report({1}, {2})


def background_saves(disk: Disk) -> None:
    """The same, while training would go on."""
    with checkpointer(disk) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state(step)).result(60)
            disk.report(*({done} for done in range(1, step + 1)))


def saves_that_replace(disk: Disk) -> None:
    """Three steps, of which only the newest is kept: the one before may go as soon as nothing can take it away."""
    with checkpointer(disk, keep_last=1) as ckpt:
        for step in (1, 2, 3):
            if step > 1:
                disk.promise({step - 1, step})
            ckpt.save(step, state(step), wait=True)
            disk.report({step})


def saves_of_ranks(disk: Disk, *, world_size: int, seed: int, steps: int = 2) -> None:
    """Ranks that save together, and take turns at each system call in an order that the seed decides."""
    turns = Turns(seed)
    disk.before = lambda call: turns.pass_on()
    savers = [Saver(coordinator, store(disk), OPTIONS) for coordinator in coordinators(world_size, turns)]
    for step in range(1, steps + 1):
        turns.run([partial(saver.save, f"{step_directory(step)}/", step, state(step), {}) for saver in savers])
        disk.report(*({done} for done in range(1, step + 1)))


def saves_in_what_others_made(disk: Disk) -> None:
    """Another process has made the root and the directory of the step a moment ago, and was killed."""
    disk.mkdir(os.path.dirname(ROOT))
    for step in (1, 2):
        for directory in (ROOT, f"{ROOT}/{step_directory(step)}"):
            with suppress(FileExistsError):
                disk.mkdir(directory)
        with checkpointer(disk) as ckpt:
            ckpt.save(step, state(step), wait=True)
            disk.report(*({done} for done in range(1, step + 1)))


def prune_after_a_kill(disk: Disk) -> None:
    """A process is killed right after it has published the second step, and another one prunes for its sake."""
    save_and_die(disk)
    disk.promise({1, 2})
    pruner = Pruner(store(disk))
    for removal in pruner.plan(Root(store(disk)).look(), Retention(keep_last=1)):
        pruner.remove(removal)
    disk.report({2})


def commit_found_after_a_kill(disk: Disk) -> None:
    """The same, and another one, which waits for that save, reports its success."""
    attempt = save_and_die(disk)
    assert find_committed(store(disk), f"{step_directory(2)}/", attempt) is not None
    disk.report({1}, {2})


def save_and_die(disk: Disk) -> str:
    """Save two steps, the second only just, and return the id of that attempt."""
    saver = Saver(coordinators(1, Turns(0))[0], store(disk), OPTIONS)
    saver.save(f"{step_directory(1)}/", 1, state(1), {})
    disk.report({1})
    prepared = saver.prepare(f"{step_directory(2)}/", 2, state(2), {}, Timings())
    with dying_when_published(disk, MANIFEST_NAME, times=2):
        saver.finish(prepared, Timings())
    return prepared.attempt


@contextmanager
def dying_when_published(disk: Disk, name: str, times: int = 1) -> Iterator[None]:
    """Let the process of the block be killed as soon as there are so many files of this name."""

    def die(call: str) -> None:
        if disk.moments and sum(name in entries for entries in disk.moments[-1].directories.values()) == times:
            raise Killed

    disk.before = die
    with suppress(Killed):
        yield
    disk.before = lambda call: None


def file_of_another(disk: Disk) -> None:
    """A process is killed right after it has put a file, in directories that it had to make; another one makes it last."""
    with dying_when_published(disk, "marker"):
        store(disk).put_if_absent("a/b/marker", b"content")
    store(disk).make_durable("a/b/marker")
    disk.report()


def files(disk: Disk) -> None:
    """What a store promises of single files: made, put, replaced and deleted, each is so for good when the call returns."""
    root = store(disk)
    operations = (
        lambda: root.put_if_absent("a/b/marker", b"content"),
        lambda: store_file(root, "c/d/file", some_bytes(ALIGNMENT + 1)),
        lambda: store_file(root, "c/another", b"data"),
        lambda: root.put_if_absent("c/d/manifest", b"content"),
        lambda: replace_file(root, "c/another", b"other data"),
        lambda: replace_file(root, "e/another", b"the first one"),
        lambda: root.delete("c/d/file"),
        lambda: root.delete("c/d/manifest"),
        lambda: root.delete("a/b/marker"),
    )
    for operation in operations:
        operation()
        disk.report()


def replace_file(root: LocalStore, name: str, data: bytes) -> None:
    """Put another file in the place of one."""
    with root.replace(name, len(data)) as writer:
        write(writer, data)
        writer.finish()


def on_disk(world: World, *, links: bool = True, ignored: Flush | None = None) -> Disk:
    """A disk on which ``world`` was done; it had one empty directory."""
    disk = Disk(links=links, ignored=ignored)
    disk.put("/disk")
    world(disk)
    return disk


WORLDS: Final[dict[str, World]] = {
    "saves": saves,
    "background saves": background_saves,
    "saves that replace": saves_that_replace,
    "saves in what others made": saves_in_what_others_made,
    "prune after a kill": prune_after_a_kill,
    "commit found after a kill": commit_found_after_a_kill,
    "two ranks": partial(saves_of_ranks, world_size=2, seed=0, steps=1),
    "files": files,
    "file of another": file_of_another,
}
