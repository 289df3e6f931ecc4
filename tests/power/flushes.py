# SPDX-License-Identifier: Apache-2.0
"""Which place in the engine a flush comes from, told by the stack: so that one place at a time can be made to do nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Final

import shardckpt.store

_STORE: Final = str(Path(shardckpt.store.__file__).parent)
Flush = tuple[str, ...]
"""The lines of the storage room that are on the way to a flush, outermost first, as ``module.function:line``."""


def calling_flush() -> Flush:
    """The flush that the caller's caller carries out."""
    lines: list[str] = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(_STORE):
            line = f"{Path(code.co_filename).stem}.{code.co_name}:{frame.f_lineno}"
            # one that calls itself is one place, however deep
            if line not in lines:
                lines.append(line)
        frame = frame.f_back
    return tuple(reversed(lines))
