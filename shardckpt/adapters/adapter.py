# SPDX-License-Identifier: Apache-2.0
"""What the adapter of each kind of object implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from .base import Finish
from .opening import Opening
from .saving import Saving


class Adapter(ABC):
    """Turns one kind of object into a tree, and takes one back."""

    @abstractmethod
    def takes(self, value: object) -> bool:
        """Whether ``value`` is of this kind."""

    @abstractmethod
    def expand(self, value: Any, path: str, saving: Saving) -> Any:
        """The state of ``value`` as a tree of tensor leaves, values and containers, without copies; or `Nothing`."""

    @abstractmethod
    def open(self, value: Any, path: str, opening: Opening, *, per_rank: bool) -> Finish:
        """Ask ``opening`` for what ``value`` wants; the result puts it back."""
