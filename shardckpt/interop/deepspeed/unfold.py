# SPDX-License-Identifier: Apache-2.0
"""Values that share parts, and how large they are without: what a walk, a comparison or a message would come by."""

from __future__ import annotations

from typing import Any

from .classes import Opaque

DEEPEST = 100
"""Levels; a value that is nested deeper is refused."""
_CONTAINERS = (list, tuple, dict, Opaque)


def require_tree(value: Any, limit: int) -> None:
    """Raise ValueError for a value that holds itself, is nested too deep, or has more than ``limit`` parts when each counts as
    often as it occurs. Takes time for each part once.
    """
    measured: dict[int, tuple[int, int]] = {}
    inside: set[int] = set()
    waiting = [value] if isinstance(value, _CONTAINERS) else []
    while waiting:
        container = waiting[-1]
        if id(container) in measured:
            waiting.pop()
            continue
        nested = [part for part in _parts(container) if isinstance(part, _CONTAINERS)]
        if id(container) not in inside:
            inside.add(id(container))
            if any(id(part) in inside for part in nested):
                raise ValueError("it holds a value that holds itself")
            waiting += nested
            continue
        inside.discard(id(container))
        parts = len(_parts(container)) + sum(measured[id(part)][0] for part in nested)
        levels = 1 + max((measured[id(part)][1] for part in nested), default=0)
        if parts > limit or levels > DEEPEST:
            raise ValueError(f"it is nested deeper than {DEEPEST} levels, or has more than {limit} parts when none are shared")
        measured[id(container)] = parts, levels


def _parts(container: Any) -> Any:
    # keys of dicts, and what sets hold, are flat
    if isinstance(container, Opaque):
        return container.state.values()
    return container.values() if isinstance(container, dict) else container
