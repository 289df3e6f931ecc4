# SPDX-License-Identifier: Apache-2.0
"""The work of rank 0 of a job of any size, in one process: planning, the manifest, and planning a load.

Everything that grows with ranks or tensors is done in full; only the network is left out. What saves and what loads run in
processes of their own, because a load meets no cache that a save has filled.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from time import perf_counter

import msgspec
import torch

from ..checksum import DIGEST_BYTES
from ..commit import Contents, build_manifest, draft_manifest
from ..coordinate import Coordinator
from ..exchange import Exchanged, Statement, exchange
from ..header import safetensors_header
from ..layout import Ints, Mesh, MeshLayout, PerRankLayout, Replicated, Shard
from ..manifest import rank_file_name
from ..plan import Plan, make_plan
from ..reshard import Want, plan_reads
from ..tables import Described, encode_table, merge_tables, per_rank_shapes
from ..validate import parse_manifest
from ..write import Receipt
from .launch import OnProgress, Progress, run_ranks
from .machine import Machine, describe_machine
from .planning_peer import PeerPlanning, plan_peer
from .shapes import count_parameters, llama_parameters
from .spec import PlanSpec

RNG_BYTES = {"cpu": 5056, "numpy": 2509, "python": 2509}
PLANNING = "planning: "
"""What the names of rank 0's steps until the commit begin with."""
READING_BACK = "reading the manifest back"

BARS: dict[tuple[str, int], tuple[float, int, float]] = {
    ("llama-70b", 1024): (1.0, 2_000_000, 0.2),
    ("llama-70b", 16384): (5.0, 6_000_000, 1.0),
}
"""Seconds of planning, bytes of manifest, and seconds of reading it back, that are to be reached."""


@dataclass(frozen=True, slots=True)
class Step:
    """One part of the work."""

    name: str
    """What is done, and by whom."""
    median_s: float
    """Seconds, median of the rounds."""
    seconds: tuple[float, ...]
    """Seconds of each round."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What one rank in the middle would read if it read for itself alone; where that is too much, ranks read for each other."""

    ranks: int
    """World size that loads."""
    seconds: float
    """Time to plan it, median of the rounds."""
    files: int
    """Rank files that hold something of what it needs."""
    bytes_needed: int
    """Bytes of tensor data that it needs."""
    bytes_read: int
    """Bytes that it would read: whole digest blocks."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure that is to be reached."""

    name: str
    """Which figure."""
    found: float
    """What was measured, in seconds or bytes."""
    bar: float
    """At most this much."""
    met: bool
    """Whether it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """What planning costs."""

    benchmark: str = "plan"
    """Always ``plan``."""
    machine: Machine
    """Where it ran."""
    model: str
    """Which model."""
    parameters: int
    """Its parameters; each has two moments."""
    tensors: int
    """Tensors of the state."""
    ranks: int
    """World size."""
    steps: Sequence[Step]
    """Where the time goes."""
    planning_s: float
    """All that rank 0 does from the first introduction to the validated manifest, in seconds."""
    manifest_bytes: int
    """Size of the manifest."""
    reading_back_s: float
    """Decoding and checking it in a new process, in seconds."""
    loads: Sequence[LoadPlan]
    """Planning loads by as many ranks, and by half of them, on one rank."""
    bars: Sequence[Bar]
    """What is to be reached for this model and world size, if anything is."""
    peer: PeerPlanning | None
    """The same for DCP."""


@dataclass(slots=True)
class _Watch:
    """Seconds by what they were spent on, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        begun = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - begun


def measure_planning(spec: PlanSpec, folder: str, on_progress: OnProgress) -> PlanReport:
    """Do the work of rank 0. The peer's metadata goes under ``folder`` for a moment."""
    total = 2 * spec.rounds + bool(spec.peer_ranks)
    rounds: list[dict[str, float]] = []
    loads: list[list[LoadPlan]] = []
    for number in range(spec.rounds):
        on_progress(Progress(2 * number, total, f"round {number + 1}: planning a save by {spec.ranks} ranks"))
        (saving, manifest), *_ = run_ranks(1, _simulate_save, spec, on_progress)
        on_progress(Progress(2 * number + 1, total, f"round {number + 1}: reading the manifest back"))
        (loading, planned), *_ = run_ranks(1, _simulate_load, (manifest, spec), on_progress)
        rounds.append({**saving, **loading})
        loads.append(planned)
    peer = None
    if spec.peer_ranks:
        on_progress(Progress(total - 1, total, f"DCP plans a save by {spec.peer_ranks} ranks"))
        peer = run_ranks(1, plan_peer, (spec, os.path.abspath(folder)), on_progress)[0]
    on_progress(Progress(total, total, "done"))
    by_step = {name: tuple(seconds[name] for seconds in rounds) for name in rounds[0]}
    planning = median(sum(s for name, s in seconds.items() if name.startswith(PLANNING)) for seconds in rounds)
    reading = median(by_step[READING_BACK])
    return PlanReport(
        machine=describe_machine(folder),
        model=spec.model,
        parameters=count_parameters(spec.model),
        tensors=len(_describe(spec.model, 1)),
        ranks=spec.ranks,
        steps=[Step(name, median(seconds), seconds) for name, seconds in by_step.items()],
        planning_s=planning,
        manifest_bytes=len(manifest),
        reading_back_s=reading,
        loads=[replace(same[0], seconds=median(load.seconds for load in same)) for same in zip(*loads, strict=True)],
        bars=_compare(spec, planning, len(manifest), reading),
        peer=peer,
    )


def _compare(spec: PlanSpec, planning: float, nbytes: int, reading: float) -> list[Bar]:
    names = ("planning_s", "manifest_bytes", "reading_back_s")
    found = (planning, nbytes, reading)
    bars = BARS.get((spec.model, spec.ranks), ())
    return [Bar(name, value, bar, value <= bar) for name, value, bar in zip(names, found, bars, strict=False)]


# ---- in processes of their own


def _simulate_save(report: OnProgress, spec: PlanSpec) -> tuple[dict[str, float], bytes]:
    """Seconds by step, and the manifest."""
    watch = _Watch()

    def make_statement() -> Statement:
        described = _describe(spec.model, spec.ranks)
        top = ("model", "optimizer", "rng", "scheduler")
        return Statement(encode_table(top, described), per_rank_shapes(described), _values(spec.model))

    exchanged = exchange(_RankZero(spec.ranks, watch), "save", make_statement)
    with watch.on(f"{PLANNING}merge the distinct tables"):
        merged = merge_tables(exchanged.tables or (), exchanged.table_of, exchanged.shapes)
    with watch.on(f"{PLANNING}decide who writes what"):
        plan = make_plan(spec.ranks, merged)
    with watch.on("one rank: lay out its file and make the header"):
        header = len(safetensors_header(plan.file_pieces(spec.ranks // 2)))
    posted = _make_receipts(plan, exchanged, header)
    with watch.on(f"{PLANNING}decode the receipts of all ranks"):
        receipts = [msgspec.msgpack.decode(data, type=Receipt) for data in posted]
    contents = Contents(
        step=1000,
        attempt=exchanged.nonce,
        objects={name[7:]: value for name, value in exchanged.values.items() if name.startswith("object:")},
        containers={},
        metadata={},
        torch=str(torch.__version__),
    )
    with watch.on(f"{PLANNING}build the manifest and validate it"):
        manifest = build_manifest(draft_manifest(plan, contents), receipts)
    return watch.seconds, manifest


def _simulate_load(report: OnProgress, job: tuple[bytes, PlanSpec]) -> tuple[dict[str, float], list[LoadPlan]]:
    """Seconds by step, and what loads by one rank would read."""
    manifest, spec = job
    watch = _Watch()
    with watch.on(READING_BACK):
        plan = parse_manifest(manifest).plan
    return watch.seconds, [_plan_load(plan, spec, ranks) for ranks in dict.fromkeys((spec.ranks, max(1, spec.ranks // 2)))]


def _plan_load(plan: Plan, spec: PlanSpec, ranks: int) -> LoadPlan:
    described = _describe(spec.model, ranks)
    rank = ranks // 2
    begun = perf_counter()
    wants = []
    for key, found in enumerate(described):
        piece = found.layout.piece(rank)
        if piece is not None:
            per_rank = isinstance(found.layout, PerRankLayout)
            wants.append(Want(key, plan.by_name[found.name], piece, rank if per_rank else None))
    reads = plan_reads(plan, wants)
    seconds = perf_counter() - begun
    needed = sum(want.piece.numel * want.tensor.itemsize for want in wants)
    return LoadPlan(ranks, seconds, len(reads), needed, sum(file.nbytes for file in reads))


class _RankZero(Coordinator):
    """Rank 0 of many ranks that all post the same, apart from what only one of them has to send."""

    def __init__(self, world_size: int, watch: _Watch) -> None:
        super().__init__(0, world_size, 600.0, _no_store)
        self._watch = watch

    def round(
        self,
        label: str,
        produce: Callable[[], bytes] = bytes,
        decide: Callable[[list[bytes]], bytes] = lambda payloads: b"",
        *,
        timeout: float | None = None,
        name: str | None = None,
    ) -> bytes:
        with self._watch.on(f"one rank: {label}"):
            mine = produce()
        self.rank = 1
        other = produce()
        self.rank = 0
        with self._watch.on(f"{PLANNING}{label} of all ranks"):
            return decide([mine, *[other] * (self.world_size - 1)])


def _no_store() -> None:
    raise ConnectionError("ranks that are simulated have no store")


def _describe(model: str, ranks: int) -> list[Described]:
    """What one rank says of the model's state under FSDP2 over all ranks."""
    mesh = Mesh(tuple(range(ranks)), (ranks,))
    described = []
    layouts: dict[Ints, MeshLayout] = {}
    for name, shape in llama_parameters(model):
        layout = layouts.setdefault(shape, MeshLayout(shape, mesh, (Shard(0),)))
        described.append(Described(f"model/{name}", "float32", layout))
        for moment in ("exp_avg", "exp_avg_sq"):
            described.append(Described(f"optimizer/state/{name}/{moment}", "float32", layout))
        described.append(Described(f"optimizer/state/{name}/step", "float32", Replicated(())))
    for generator, nbytes in RNG_BYTES.items():
        described.append(Described(f"rng/{generator}", "uint8", PerRankLayout((nbytes,))))
    return described


def _values(model: str) -> dict[str, object]:
    """Replicated values as a training script has them: two parameter groups, and a schedule."""
    names = {True: [n for n, s in llama_parameters(model) if len(s) > 1], False: []}
    names[False] = [n for n, s in llama_parameters(model) if len(s) == 1]
    values: dict[str, object] = {"step": 1000, "metadata": {}, "object:scheduler/last_epoch": 1000}
    for number, decayed in enumerate((True, False)):
        group = f"object:optimizer/param_groups/{number}"
        values |= {f"{group}/params": names[decayed], f"{group}/weight_decay": 0.1 * decayed, f"{group}/lr": 1e-4}
    return values


def _make_receipts(plan: Plan, exchanged: Exchanged, header: int) -> list[bytes]:
    """What all ranks post when they have written their files."""
    posted = []
    for rank, data_bytes in enumerate(plan.bytes_by_rank.tolist()):
        digests = os.urandom(DIGEST_BYTES * -(-data_bytes // plan.block_size))
        name = f"step-00001000/{rank_file_name(rank, exchanged.nonce)}"
        receipt = Receipt(name, header + data_bytes, header, os.urandom(DIGEST_BYTES).hex(), digests)
        posted.append(msgspec.msgpack.encode(receipt))
    return posted
