# SPDX-License-Identifier: Apache-2.0
"""The torch edge: a user's state as named local tensors and values, and back into a user's state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from .adapters.adapter import Adapter
from .adapters.base import Finish, PerRank
from .adapters.module import ModuleAdapter
from .adapters.names import ParameterNames
from .adapters.opening import Opening
from .adapters.optimizer import OptimizerAdapter
from .adapters.partitioned import PartitionedModelAdapter, PartitionedOptimizerAdapter, ReceivedAdapter
from .adapters.rng import RNGAdapter, RNGState
from .adapters.saving import Captured, Saving
from .adapters.stateful import StatefulAdapter
from .adapters.weights import WeightsAdapter
from .adapters.zero import ZeroAdapter
from .describe import Flat, LocalTensor, Whereabouts, sample_digest, sample_digests
from .errors import StateError
from .tree import StoredIndex, StoredTensor, child
from .values import Container

ADAPTERS: tuple[Adapter, ...] = (
    ModuleAdapter(),
    ZeroAdapter(),
    OptimizerAdapter(),
    PartitionedModelAdapter(),
    PartitionedOptimizerAdapter(),
    ReceivedAdapter(),
    WeightsAdapter(),
    RNGAdapter(),
    StatefulAdapter(),
)
"""In the order in which they are asked."""


def capture(state: Mapping[str, Any], here: Whereabouts | None = None) -> Captured:
    """The leaves of ``state`` as this rank has them, without copies.

    Raises UnsupportedLeaf for what is not stored, DuplicateName for equal names, StateError for the rest; each names the
    path in the state.
    """
    check_root(state)
    saving = Saving(ADAPTERS, ParameterNames(state), here or Whereabouts.here())
    for key, value in state.items():
        if not _is_empty(value):
            saving.add(child("", key), value)
    return saving.captured


class Target:
    """A state that a checkpoint is loaded into.

    The engine fills the memory in ``wanted``, then calls ``finish``.
    """

    def __init__(self, state: Mapping[str, Any], opening: Opening, finish: Finish) -> None:
        self._state = state
        self._opening = opening
        self._finish = finish

    @property
    def wanted(self) -> list[LocalTensor]:
        """Memory to fill in place. ``name`` is the stored name to read; it comes twice when tied weights were untied."""
        return self._opening.wanted

    @property
    def values_wanted(self) -> list[str]:
        """Names of stored values that ``finish`` puts back."""
        return self._opening.values_wanted

    @property
    def missing(self) -> list[str]:
        """Names that the target wants and the checkpoint does not have. What they stand for stays as it is."""
        return self._opening.missing

    @property
    def used(self) -> Collection[str]:
        """Stored names that this rank's target has a place for."""
        return self._opening.used

    @property
    def unexpected(self) -> list[str]:
        """Stored names, below the keys that the target has, which nothing on this rank wants."""
        stored = self._opening.stored
        names = (name for key in self._state for name in stored.below(child("", key)))
        return [name for name in names if self._opening.is_unexpected(name)]

    @property
    def kept(self) -> list[str]:
        """Per-rank names for which this rank, being beyond the saved world size, keeps what it has."""
        return self._opening.kept

    def finish(self) -> Mapping[str, Any]:
        """Put everything back into the target, once all of ``wanted`` is filled; the restored state."""
        restored: Mapping[str, Any] = self._finish()
        return restored


def open_target(
    state: Mapping[str, Any],
    stored: StoredIndex,
    *,
    select: Callable[[str], bool] = lambda name: True,
    here: Whereabouts | None = None,
) -> Target:
    """What ``state`` wants of a checkpoint that holds ``stored``. Nothing in ``state`` changes before `Target.finish`
    and the filling of `Target.wanted`.

    Names for which ``select`` is false are neither wanted nor missing nor unexpected.
    Raises TargetMismatch when kinds of leaves or param groups do not fit.
    """
    check_root(state)
    opening = Opening(ADAPTERS, ParameterNames(state), here or Whereabouts.here(), stored, select)
    finish = opening.open_root(state)
    return Target(state, opening, finish)


def check_root(state: object) -> None:
    """Raise StateError for what is no state at all."""
    if not isinstance(state, Mapping) or not all(type(key) is str for key in state):
        kind = type(state).__name__
        raise StateError(
            f"the state has to be a mapping with str keys, such as {{'model': model}}, but it is a {kind}", type=kind
        )


def _is_empty(value: object) -> bool:
    """Whether a top-level entry is there only so that all ranks have the same keys."""
    return isinstance(value, Mapping) and not value


__all__ = [
    "Captured",
    "Container",
    "Flat",
    "LocalTensor",
    "PerRank",
    "RNGState",
    "StoredIndex",
    "StoredTensor",
    "Target",
    "Whereabouts",
    "capture",
    "open_target",
    "sample_digest",
    "sample_digests",
]
