# SPDX-License-Identifier: Apache-2.0
"""What is injected is all there is: no file below a root is touched but through the door of the store."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardckpt.maintain.verify import verify
from shardckpt.store import LocalStore
from tests.faults.forks import LONGEST, run_worlds
from tests.faults.saves import make_root, recover, restore_newest, save_next
from tests.ranks import RankPool
from tests.store.faults import FaultyFileSystem

pytestmark = pytest.mark.timeout(2 * LONGEST)
AUDITED = {
    *("open", "os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.link", "os.symlink", "os.listdir", "os.scandir"),
    *("os.truncate", "os.chmod", "os.utime", "shutil.rmtree", "shutil.copyfile", "shutil.move"),
}
"""What Python reports of itself: not status calls, and nothing about descriptors, which had to be opened before."""


class Door(FaultyFileSystem):
    """Knows which thread is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = threading.local()
        self.passed = 0

    def _call(self, name: str, operation: Callable[..., Any], *args: Any) -> Any:
        self.inside.now = True
        try:
            return super()._call(name, operation, *args)
        finally:
            self.inside.now = False


def use_and_watch(root: Path) -> tuple[int, list[str]]:
    """Save, prune, restore and verify; how many audited calls below ``root`` went through the door, and those that did not."""
    door, beside = Door(), []

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event not in AUDITED or not args or not isinstance(args[0], str | bytes | os.PathLike):
            return
        if os.fsdecode(args[0]).startswith(str(root.parent)):
            if getattr(door.inside, "now", False):
                door.passed += 1
            else:
                beside.append(f"{event} {args[0]!r} by\n{''.join(traceback.format_stack(limit=8))}")

    sys.addaudithook(audit)
    save_next(root, door)
    save_next(root.with_name("background"), door, wait=False)
    restore_newest(root, door)
    recover(root, door)
    assert [found.ok for found in verify(LocalStore(root, door), read_data=True)] == [True, True]
    os.listdir(root)
    return door.passed, beside


def in_a_fork(root: Path) -> tuple[int, list[str]]:
    # an audit hook stays for as long as its process
    make_root(root)
    make_root(root.with_name("background"))
    [[found]] = run_worlds([[lambda: use_and_watch(root)]])
    return found


def test_all_storage_calls_go_through_one_door(ranks: RankPool, tmp_path: Path) -> None:
    [(passed, beside)] = ranks.run(1, in_a_fork, tmp_path / "root", timeout=LONGEST)
    assert passed > 100
    # the one at the end, by which we know that the others would be seen
    assert len(beside) == 1 and "use_and_watch" in beside[0], "\n".join(beside)
