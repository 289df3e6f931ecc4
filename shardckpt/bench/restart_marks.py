# SPDX-License-Identifier: Apache-2.0
"""What the ranks of `restart_job` write down, one JSON document per line."""

from __future__ import annotations

import msgspec

SAVED = 1
"""The step that is saved in the first start."""


class Mark(msgspec.Struct):
    """Something that one rank has seen."""

    start: int
    """Number of the start."""
    what: str
    """``joined`` (the process group stands), ``restored``, ``step`` (it is done), or ``kill`` (now)."""
    step: int
    """Which step; 0 before there is one."""
    at: float
    """Seconds since the epoch."""
