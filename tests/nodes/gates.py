# SPDX-License-Identifier: Apache-2.0
"""Gates in front of the phases of a save."""

from __future__ import annotations

from collections.abc import Callable

from tests.engine.phases import Phased


class Gated(Phased):
    """A file system that calls a function before one phase of the next save: ``writing``, ``receipt`` or ``commit``."""

    def __init__(self, root: str, phase: str, reach: Callable[[], None]) -> None:
        super().__init__(root)
        self.armed = False
        """Whether the next save is the one."""
        self._gated = phase
        self._come = reach

    def _reach(self, phase: str) -> None:
        if self.armed and phase == self._gated:
            self.armed = False
            self._come()
