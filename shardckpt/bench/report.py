# SPDX-License-Identifier: Apache-2.0
"""What a benchmark found, as data: medians, extremes, rates and ratios. The field names are the keys of ``--json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from .contest import Outcome, Sample
from .contestants import PEER, RAW
from .machine import Machine
from .shapes import GPTShape
from .spec import SaveSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadFacts:
    """What was saved and loaded."""

    bytes: int
    """On all ranks together."""
    ranks: int
    """Ranks that saved."""
    parameters: int
    """Number of parameters; each has two moments."""
    tensors: int
    """Tensors on each rank."""
    layers: int
    """Blocks of the GPT."""
    width: int
    """Length of a token's vector."""
    vocabulary: int
    """Rows of the embedding."""
    rounds: int
    """Turns that each contestant took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Layouts of a measurement."""

    from_ranks: int
    """World size that saved."""
    to_ranks: int
    """World size that loaded; of a save, the same."""
    dim: int = 0
    """Dimension that the target was sharded on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """All turns of one contestant in one case."""

    case: Case
    """Layouts."""
    cache: str
    """``warm`` or ``cold``; of a save, empty."""
    contestant: str
    """``shardckpt``, ``dcp`` or ``raw``."""
    seconds: tuple[float, ...]
    """Each turn's wall time, of the slowest rank."""
    median_s: float
    """Median of these."""
    min_s: float
    """Least of these."""
    max_s: float
    """Greatest of these."""
    gb_per_s: float
    """10^9 bytes of state per second, at the median."""
    times_dcp: float
    """Median time of DCP divided by this one."""
    of_raw: float
    """Median time of the raw disk divided by this one."""
    bytes_needed: int | None
    """Bytes of tensor data that all targets hold together, if counted."""
    bytes_read: int | None
    """Bytes that were read for them, if counted."""
    read_amplification: float | None
    """The latter divided by the former."""
    verified: bool
    """Whether what came back was compared with what was saved, bit for bit; a difference would have ended the run."""


@dataclass(frozen=True, slots=True)
class Report:
    """A benchmark that moved data."""

    benchmark: str
    """``save``, ``load`` or ``reshard``."""
    machine: Machine
    """Where it ran."""
    workload: WorkloadFacts
    """What was saved and loaded."""
    results: Sequence[Line]
    """Contestants by case, in the order of their turns."""
    raw_ways: dict[str, str] = field(default_factory=dict)
    """How the raw bytes were moved: the fastest way of those that were tried on this machine."""
    cold_by: str = ""
    """How files were taken out of the page cache. What lies beneath (a host, a controller) may cache as well."""


def describe_workload(spec: SaveSpec, nbytes: int, num_tensors: int) -> WorkloadFacts:
    """Facts about the state that ``spec`` asked for, and of which all ranks hold ``nbytes`` bytes."""
    shape = GPTShape.of_size(spec.nbytes)
    return WorkloadFacts(
        bytes=nbytes,
        ranks=spec.ranks,
        parameters=shape.parameters,
        tensors=num_tensors,
        layers=shape.layers,
        width=shape.width,
        vocabulary=shape.vocabulary,
        rounds=spec.rounds,
    )


def summarize(case: Case, outcome: Outcome) -> list[Line]:
    """One line per contestant and state of the cache."""
    turns: dict[tuple[str, str], list[Sample]] = {}
    for sample in outcome.samples:
        turns.setdefault((sample.cache, sample.contestant), []).append(sample)
    medians = {key: median(sample.seconds for sample in samples) for key, samples in turns.items()}
    return [
        _line(case, samples, outcome.nbytes, medians[cache, PEER], medians[cache, RAW]) for (cache, _), samples in turns.items()
    ]


def _line(case: Case, samples: Sequence[Sample], nbytes: int, peer: float, raw: float) -> Line:
    seconds = tuple(sample.seconds for sample in samples)
    middle = median(seconds)
    traffic = samples[-1].traffic
    return Line(
        case=case,
        cache=samples[0].cache,
        contestant=samples[0].contestant,
        seconds=seconds,
        median_s=middle,
        min_s=min(seconds),
        max_s=max(seconds),
        gb_per_s=nbytes / 1e9 / middle,
        times_dcp=peer / middle,
        of_raw=raw / middle,
        bytes_needed=traffic.needed if traffic else None,
        bytes_read=traffic.read if traffic else None,
        read_amplification=traffic.read / traffic.needed if traffic else None,
        verified=samples[0].contestant != RAW,
    )
