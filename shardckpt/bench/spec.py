# SPDX-License-Identifier: Apache-2.0
"""What is to be measured, as frozen dataclasses that refuse bad values with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError
from .shapes import GPTShape, count_parameters

Cache = Literal["warm", "cold"]
CACHES: tuple[Cache, ...] = ("warm", "cold")
Device = Literal["auto", "cpu", "cuda"]
DEVICES: tuple[Device, ...] = ("auto", "cpu", "cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveSpec:
    """Durable saves."""

    nbytes: int = 2_900_000_000
    """Size of the state of all ranks together."""
    ranks: int = 2
    """World size."""
    rounds: int = 5
    """Times that each contestant takes its turn."""

    def __post_init__(self) -> None:
        GPTShape.of_size(self.nbytes)
        _require_counts(ranks=[self.ranks], rounds=[self.rounds])


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSpec(SaveSpec):
    """Loads onto the layout that was saved."""

    caches: Sequence[Cache] = CACHES
    """Whether the files are in the page cache when a load begins."""

    def __post_init__(self) -> None:
        # zero-argument super() does not work in a dataclass with slots
        SaveSpec.__post_init__(self)
        _require_caches(self.caches)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshardSpec(SaveSpec):
    """Loads onto other layouts; ``ranks`` save."""

    to_ranks: Sequence[int] = (4, 8)
    """World sizes that load."""
    dims: Sequence[int] = (0,)
    """Dimensions that the targets are sharded on; states are saved sharded on 0."""
    caches: Sequence[Cache] = ("cold",)
    """Whether the files are in the page cache when a load begins."""

    def __post_init__(self) -> None:
        SaveSpec.__post_init__(self)
        _require_counts(to_ranks=self.to_ranks)
        _require_caches(self.caches)
        if not self.dims or not set(self.dims) <= {0, 1}:
            raise ConfigError(f"dims={list(self.dims)} are not 0 or 1: the largest tensors of a GPT are matrices")
        width = GPTShape.of_size(self.nbytes).width
        uneven = [ranks for ranks in self.to_ranks if width % ranks]
        if 1 in self.dims and uneven:
            raise ConfigError(f"FSDP2 shards dimension 1 evenly only, and {uneven[0]} ranks do not divide {width}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AsyncSpec(SaveSpec):
    """Training, and saves beside it."""

    nbytes: int = 200_000_000
    """Size of the state of all ranks together."""
    rounds: int = 2
    """Times that each contestant takes its turn."""
    saves: int = 3
    """Saves of a turn; one more comes before them and does not count."""
    steps: int = 2
    """Training steps for each save; more are taken while it is not durable, and twice as many before the first one."""
    samples: int = 1
    """Rows of tokens that each rank trains on in a step."""
    contestants: Sequence[str] = ()
    """Patterns of names, such as ``dcp-*``; none for all."""
    device: Device = "auto"
    """Where the model is trained; ``auto`` takes GPUs when there is one for each rank."""

    def __post_init__(self) -> None:
        SaveSpec.__post_init__(self)
        _require_counts(saves=[self.saves], steps=[self.steps], samples=[self.samples])
        if self.device not in DEVICES:
            raise ConfigError(f"device={self.device!r} is not one of {', '.join(DEVICES)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSpeedSpec(SaveSpec):
    """Saves of DeepSpeed engines, resumes on another number of ranks, and imports."""

    nbytes: int = 1_212_000_000
    """Size of masters and moments of all ranks together: of 101 M parameters."""
    ranks: int = 4
    """World size that saves."""
    to_ranks: int = 2
    """World size that resumes."""
    rounds: int = 3
    """Times that each contestant takes its turn."""

    def __post_init__(self) -> None:
        SaveSpec.__post_init__(self)
        _require_counts(to_ranks=[self.to_ranks])


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartSpec(SaveSpec):
    """Restarts of a job that has lost a process."""

    nbytes: int = 600_000_000
    """Size of the state of all ranks together."""
    rounds: int = 3
    """Times that each contestant takes its turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSpec:
    """Planning for many ranks, simulated in one process."""

    ranks: int = 1024
    """World size of the job that saves."""
    model: str = "llama-70b"
    """Which model, under FSDP2 over all ranks, with Adam."""
    rounds: int = 3
    """Times that all of it is done, each time in new processes."""
    peer_ranks: int = 0
    """World size for which DCP's planner is tried too; 0 leaves it out. Its time grows with tensors times ranks."""

    def __post_init__(self) -> None:
        _require_counts(ranks=[self.ranks], rounds=[self.rounds])
        if type(self.peer_ranks) is not int or self.peer_ranks < 0:
            raise ConfigError(f"peer_ranks={self.peer_ranks!r} is not an int of at least 0")
        count_parameters(self.model)


def _require_counts(**counts: Sequence[int]) -> None:
    for name, values in counts.items():
        wrong = [value for value in values if type(value) is not int or value < 1]
        if wrong or not values:
            raise ConfigError(f"{name}={wrong[0] if wrong else list(values)!r} is not an int of at least 1")


def _require_caches(caches: Sequence[str]) -> None:
    if not caches or not set(caches) <= set(CACHES):
        raise ConfigError(f"caches={list(caches)} are not some of {', '.join(CACHES)}")
