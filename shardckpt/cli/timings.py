# SPDX-License-Identifier: Apache-2.0
"""``shardckpt show --timings``: the phases of a save, and the ranks that held it up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shardckpt.maintain.timings import PhaseTimes, laggards

from .output import print_table, say

_ALL_SHOWN = 16
"""Up to this many ranks are all listed."""
_WORST_SHOWN = 8
"""Of more ranks, so many."""


def print_timings(phases: Sequence[PhaseTimes], world_size: int) -> None:
    """Print a line for each phase, then the ranks, with the slowest of each phase marked."""
    columns = ("phase", "min s", "median s", "max s", "slowest rank", "its GB/s", "median GB/s")
    print_table(columns, [_phase_row(phase) for phase in phases], numbers=columns[1:])
    shared = [phase for phase in phases if len(phase.seconds) > 1]
    if not shared:
        return
    ranks = list(range(world_size)) if world_size <= _ALL_SHOWN else laggards(shared, _WORST_SHOWN)
    which = "" if len(ranks) == world_size else f" of the {len(ranks)} ranks of {world_size:,} that were most behind the median"
    say()
    say(f"Seconds{which}; * marks the slowest rank of all:")
    names = ("rank", *(phase.phase for phase in shared))
    print_table(names, [_rank_row(shared, rank) for rank in ranks], numbers=names)


def _phase_row(phase: PhaseTimes) -> tuple[str, ...]:
    speeds = [speed for rank in range(len(phase.seconds)) if (speed := phase.speed(rank)) is not None]
    slowest = phase.speed(phase.slowest)
    return (
        phase.phase,
        *(f"{seconds:.3f}" for seconds in (min(phase.seconds), np.median(phase.seconds), max(phase.seconds))),
        str(phase.slowest),
        "" if slowest is None else f"{slowest:.2f}",
        f"{np.median(speeds):.2f}" if speeds else "",
    )


def _rank_row(phases: Sequence[PhaseTimes], rank: int) -> tuple[str, ...]:
    cells = [f"{'* ' if rank == phase.slowest else ''}{phase.seconds[rank]:.3f}" for phase in phases]
    return str(rank), *cells
