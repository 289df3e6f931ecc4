# SPDX-License-Identifier: Apache-2.0
"""Files and directories for other programs, made and replaced on a disk that loses its power."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from shardckpt.store.outside import new_directory, new_file
from tests.power.crash import Crash, Image
from tests.power.disk import Disk, Moment
from tests.power.flushes import Flush
from tests.power.judge import describe

PLACE: Final = "/disk/out/made"
"""Of what is above it, only "/disk" is there at first."""
Tree = dict[str, bytes | None]
"""What is at the place and below it, by path from there; None for a directory."""
FILES: Final[dict[int, Tree]] = {0: {}, 1: {"": b"first" * 1000}, 2: {"": b"second"}}
"""What a file is in each version; in version 0 it is not there."""
DIRECTORIES: Final[dict[int, Tree]] = {
    0: {},
    1: {"": None, "/a": b"first", "/below": None, "/below/b": b"of the first"},
    2: {"": None, "/a": b"second", "/c": b"of the second"},
}
Export = Callable[[Disk], None]


def files(disk: Disk) -> None:
    """A file, and another in its place."""
    for version in (1, 2):
        disk.promise({version - 1, version})
        with new_file(PLACE, replace=version > 1, fs=disk) as file:
            file.write(FILES[version][""])
        disk.report({version})


def directories(disk: Disk) -> None:
    """A directory, and another in its place; for a moment neither is there, as no system call here exchanges the two."""
    for version in (1, 2):
        disk.promise({0, version - 1, version})
        with new_directory(PLACE, replace=version > 1, fs=disk) as directory:
            for name, content in DIRECTORIES[version].items():
                if content is not None:
                    with directory.file(name[1:]) as file:
                        file.write(content)
        disk.report({version})


EXPORTS: Final[dict[str, tuple[Export, dict[int, Tree]]]] = {"files": (files, FILES), "directories": (directories, DIRECTORIES)}


def exported(export: Export, ignored: Flush | None = None) -> Disk:
    """A disk on which ``export`` was done; it had one empty directory."""
    disk = Disk(ignored=ignored)
    disk.put("/disk")
    export(disk)
    return disk


def first_problem(moments: Iterable[Moment], versions: dict[int, Tree]) -> str | None:
    """The first promise that a power cut breaks at one of these moments; all states are tried."""
    for number, moment in enumerate(moments):
        for image in Crash(moment).images():
            problem = _problem(image, moment.promises, versions)
            if problem:
                return f"after system call {number} ({moment.call}): {problem}; left was {describe(image)}"
    return None


def _problem(image: Image, promises: Iterable[frozenset[int]], versions: dict[int, Tree]) -> str:
    tree = {path[len(PLACE) :]: content for path, content in image if path == PLACE or path.startswith(f"{PLACE}/")}
    here = next((version for version, expected in versions.items() if tree == expected), None)
    if here is None:
        return "what is at the place is none of the versions"
    lost = [promise for promise in promises if here not in promise]
    return f"version {here} is there, and not one of {sorted(lost[0])}" if lost else ""
