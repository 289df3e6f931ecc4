# SPDX-License-Identifier: Apache-2.0
"""Which file system a path lies on, as far as the kernel tells."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")
"""Stands for a space, tab, line end or backslash in a name."""


@dataclass(frozen=True, slots=True)
class Mount:
    """A file system, where it is mounted."""

    point: str
    """Directory that it is mounted on."""
    device: str
    """What it is mounted from, by its own account."""
    kind: str
    """Its type, such as ``ext4``."""
    options: tuple[str, ...]
    """What it was mounted with."""


def read_mounts() -> bytes:
    """The kernel's table of mounts, as this process sees it; raises OSError where there is none."""
    with open("/proc/self/mounts", "rb") as file:
        return file.read()


def mount_of(path: str, read: Callable[[], bytes] = read_mounts) -> Mount | None:
    """What ``path`` lies on, links followed; None where the system does not tell. Source: proc(5) and fstab(5)."""
    place, best = os.path.realpath(path), None
    with suppress(OSError):
        for line in read().splitlines():
            fields = [os.fsdecode(_ESCAPE.sub(_character, field)) for field in line.split()]
            if len(fields) < 4 or not _is_inside(place, fields[1]):
                continue
            # of two on one directory, the later one hides the other
            if best is None or len(fields[1]) >= len(best.point):
                best = Mount(fields[1], fields[0], fields[2], tuple(fields[3].split(",")))
    return best


def _character(escape: re.Match[bytes]) -> bytes:
    return bytes([int(escape[1], 8) & 0xFF])


def _is_inside(path: str, directory: str) -> bool:
    return path == directory or path.startswith(os.path.join(directory, ""))
