# SPDX-License-Identifier: Apache-2.0
"""Save: capture the state, describe its layout, agree on a plan; then stage and finish, at once or in the background."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import msgspec
import torch

from .adapters.dtypes import dtype_name
from .commit import Contents, already_committed, draft_manifest
from .coordinate import Coordinator
from .describe import sample_digests
from .errors import MissingFile
from .events import Timings
from .exchange import Exchanged, Statement, exchange
from .feed import Samples, chunk_size
from .fencing import Fence, clear_outdated
from .finish import Job, finish_save
from .gpu import MemoryErrorGuard
from .header import safetensors_header
from .layout import PerRankLayout
from .live import LiveSource
from .manifest import MANIFEST_NAME, Manifest, encode_canonical
from .options import Options
from .plan import Plan, make_plan
from .protect import Committed, protect
from .pruning import clear_damaged
from .readback import Verify
from .replicas import replica_groups
from .root import Root
from .stage import FileData, FileMap
from .state import Captured, capture
from .store import Store
from .tables import Described, encode_table, merge_tables, per_rank_shapes
from .values import encode_value

logger = logging.getLogger("shardckpt")


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that is committed and durable."""

    url: str
    """Where it is; `shardckpt.load` takes it."""
    step: int
    """Number of the training step."""
    digest: str
    """SHA-256 of the manifest, in hex; ``load(..., expect_digest=)`` takes it."""
    bytes: int
    """Bytes of tensor data, of all ranks together."""
    seconds: float
    """Wall time on this rank from the call to the commit."""


class RankPlan:
    """A plan, and what one rank needs of it: computed once, used by every save until the layout changes."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self.plan = plan
        pieces = plan.file_pieces(rank)
        self.where = FileMap(pieces)
        self.header = safetensors_header(pieces)
        self.groups = replica_groups(plan, rank)
        self.chunk = chunk_size(plan.block_size)
        """Bytes that are staged and written in one go."""
        self._draft: Manifest | None = None

    def draft(self, contents: Contents) -> Manifest:
        """The manifest as far as it is known before anything is written."""
        if self._draft is None:
            self._draft = draft_manifest(self.plan, contents)
        return msgspec.structs.replace(
            self._draft,
            step=contents.step,
            attempt=contents.attempt,
            objects=dict(contents.objects),
            containers=dict(contents.containers),
            metadata=dict(contents.metadata),
        )


class Prepared:
    """A save that all ranks have agreed on, and of which nothing is written yet."""

    def __init__(
        self,
        prefix: str,
        exchanged: Exchanged,
        rank: int,
        plan: RankPlan,
        tensors: Mapping[str, torch.Tensor],
        require_sound: Callable[[], None],
        begun: float,
        verify: Verify | None,
        fence: Fence | None,
    ) -> None:
        self.begun = begun
        """When save was called (`perf_counter`)."""
        self.attempt = exchanged.nonce if fence is None else f"{fence.stamp}{exchanged.nonce}"
        """Hex id, the same on all ranks; random, but for the stamp of the fence."""
        self.notice = exchanged.notice
        """What rank 0 had to say to all."""
        self.plan = plan
        self.data = FileData(plan.where, tensors)
        """What goes into this rank's file."""
        self.source: LiveSource | None = None
        """What was written, when it was written straight from the state."""
        self._require_sound = require_sound
        self._verify = verify
        self._fence = fence
        self._prefix = prefix
        self._rank = rank
        self._contents = _contents(exchanged, self.attempt)

    def make_job(self) -> Job:
        """What is left to do, apart from the bytes of tensors. Takes a while on rank 0, and no part of the state."""
        return Job(
            prefix=self._prefix,
            step=self._contents.step,
            attempt=self.attempt,
            header=self.plan.header,
            block_size=self.plan.plan.block_size,
            draft=self.plan.draft(self._contents) if self._rank == 0 else None,
            verify=self._verify,
            fence=self._fence,
        )

    def sample(self, select: Callable[[str], bool] = lambda name: True) -> Samples:
        """Digests of this rank's replicas, of tensors whose name is selected, as they are now.

        Raises `DeviceMemoryError` if the memory that the state lies in has had errors by now.
        """
        self._require_sound()
        samples: Samples = {}
        for key, group in self.plan.groups.items():
            names = [name for name in group if select(name)]
            samples[key] = dict(zip(names, sample_digests([self.data.tensors[name] for name in names]), strict=True))
        return samples

    def committed(self, digest: str) -> Committed:
        """What there is to protect, now that the manifest with this digest is published."""
        return Committed(self._prefix, self.attempt, digest)

    def release(self) -> None:
        """Let go of the state's tensors, when nothing more is taken from them."""
        self.data = FileData(FileMap(()), {})

    def describe(self, store: Store, digest: str) -> Saved:
        """The checkpoint that this has become, now that it is durable; logs it."""
        url = f"{store.url}/{self._prefix}".rstrip("/")
        saved = Saved(url, self._contents.step, digest, self.plan.plan.total_bytes, perf_counter() - self.begun)
        gigabytes = saved.bytes / 1e9
        logger.info("saved %s: %.3f GB in %.2f s, %.2f GB/s", saved.url, gigabytes, saved.seconds, gigabytes / saved.seconds)
        return saved


class Saver:
    """Saves states to one store, and keeps the plan from save to save as long as the layout stays the same."""

    def __init__(
        self, coordinator: Coordinator, store: Store, options: Options, memory_errors: MemoryErrorGuard | None = None
    ) -> None:
        self._coordinator = coordinator
        self._store = store
        self._options = options
        self.parity_group = options.parity_group(coordinator.world_size)
        """How many ranks share a parity at most; None without parity."""
        self.fence: Fence | None = None
        """What keeps saves from being committed when a newer start of the run has begun."""
        self.damaged: Collection[int] = ()
        """Steps that the run has fallen back from, so that it comes to save them again."""
        self.memory_errors = memory_errors or MemoryErrorGuard()
        """Watches the GPUs that states lie on."""
        self._plan: RankPlan | None = None
        self._key = b""
        self._table: tuple[list[str], list[Described], bytes] = [], [], b""

    def save(
        self,
        prefix: str,
        step: int,
        state: Mapping[str, Any],
        metadata: Mapping[str, Any],
        timings: Timings | None = None,
        verify: Verify | None = None,
    ) -> Saved:
        """Save, straight from the state's tensors; returns when the checkpoint is durable on all ranks. Collective."""
        timings = timings or Timings()
        prepared = self.prepare(prefix, step, state, metadata, timings, verify=verify)
        saved = self.finish(prepared, timings)
        self.protect(prepared, saved)
        return saved

    def protect(self, prepared: Prepared, saved: Saved) -> None:
        """Write the parity of a save that is durable, if there is to be one. Collective; failures are logged."""
        if self.parity_group is not None:
            committed, workers = prepared.committed(saved.digest), self._options.workers
            protect(self._coordinator, self._store, committed, self.parity_group, workers=workers, source=prepared.source)

    def finish(self, prepared: Prepared, timings: Timings) -> Saved:
        """Write straight from the state's tensors, and commit. Collective."""
        source = prepared.source = LiveSource(prepared.data, prepared.plan.chunk, self._options.workers, prepared.sample)
        job, workers = prepared.make_job(), self._options.workers
        digest = finish_save(job, source, self._store, self._coordinator, workers=workers, timings=timings)
        return prepared.describe(self._store, digest)

    def prepare(
        self,
        prefix: str,
        step: int,
        state: Mapping[str, Any],
        metadata: Mapping[str, Any],
        timings: Timings,
        notice: Callable[[], bytes] = bytes,
        verify: Verify | None = None,
    ) -> Prepared:
        """Capture ``state`` and agree on a plan for saving it under ``prefix`` ("" or "step-.../"). Collective; copies nothing.

        All ranks get the ``notice()`` of rank 0.
        """
        begun = perf_counter()
        tensors: dict[str, torch.Tensor] = {}
        devices: set[torch.device] = set()

        def require_sound() -> None:
            self.memory_errors.require_sound(self._coordinator.rank, self._options.on_memory_errors, devices)

        def make_statement() -> Statement:
            if self._coordinator.rank == 0:
                _require_uncommitted(self._store, prefix, step, self.fence, self.damaged)
                if self._plan is None:
                    # once: whether this is the right directory
                    Root(self._store).require_place(prefix)
            with timings.measure("capture"):
                captured = capture(state)
                described = _describe(captured, tensors)
                table = self._encode_table(sorted(state), described)
                devices.update(tensor.device for tensor in tensors.values())
                require_sound()
            values = {"save:step": step, "save:metadata": encode_value(dict(metadata), "metadata")}
            return Statement(table, per_rank_shapes(described), _encode_values(captured) | values, notice())

        exchanged = exchange(self._coordinator, "save", make_statement, self._key)
        timings.add("exchange", perf_counter() - begun - timings.seconds["capture"])
        with timings.measure("plan"):
            plan = self._plan_for(exchanged)
        return Prepared(prefix, exchanged, self._coordinator.rank, plan, tensors, require_sound, begun, verify, self.fence)

    def _encode_table(self, top: list[str], described: list[Described]) -> bytes:
        """The table, which is the one of the last save if it says the same: to compare takes a tenth of the time."""
        last_top, last_described, table = self._table
        if not table or (top, described) != (last_top, last_described):
            table = encode_table(top, described)
            self._table = top, described, table
        return table

    def _plan_for(self, exchanged: Exchanged) -> RankPlan:
        """The plan, which is the one of the last save if nothing has changed since."""
        if exchanged.tables is not None or self._plan is None:
            merged = merge_tables(exchanged.tables or (), exchanged.table_of, exchanged.shapes)
            self._plan = RankPlan(make_plan(self._coordinator.world_size, merged), self._coordinator.rank)
            self._key = exchanged.key
        return self._plan


def _require_uncommitted(store: Store, prefix: str, step: int, fence: Fence | None, damaged: Collection[int]) -> None:
    try:
        store.open(f"{prefix}{MANIFEST_NAME}").close()
    except MissingFile:
        return
    if (fence is not None and clear_outdated(store, fence, step)) or (step in damaged and clear_damaged(store, step)):
        return
    raise already_committed(store, prefix)


def _describe(captured: Captured, tensors: dict[str, torch.Tensor]) -> list[Described]:
    """Descriptions of all tensors of this rank; their memory goes into ``tensors``. Per-rank values become tensors."""
    described = []
    for leaf in captured.tensors:
        described.append(Described(leaf.name, dtype_name(leaf.data.dtype), leaf.layout, leaf.alias_of))
        tensors[leaf.name] = leaf.data
    for name, value in captured.per_rank_values.items():
        text = bytearray(encode_canonical(encode_value(value, name)))
        tensors[name] = torch.frombuffer(text, dtype=torch.uint8)
        described.append(Described(name, "uint8", PerRankLayout((len(text),)), is_value=True))
    return described


def _encode_values(captured: Captured) -> dict[str, Any]:
    values = {f"object:{name}": encode_value(value, name) for name, value in captured.values.items()}
    return values | {f"container:{name}": encode_value(c, name) for name, c in captured.containers.items()}


def _contents(exchanged: Exchanged, attempt: str) -> Contents:
    values = exchanged.values
    return Contents(
        step=values["save:step"],
        attempt=attempt,
        objects={name[7:]: value for name, value in values.items() if name.startswith("object:")},
        containers={name[10:]: value for name, value in values.items() if name.startswith("container:")},
        metadata=values["save:metadata"],
        torch=str(torch.__version__),
    )
