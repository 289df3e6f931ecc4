# SPDX-License-Identifier: Apache-2.0
"""Load: read and check the manifest, find out what this rank wants, read, verify, place, put values back."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from time import perf_counter
from typing import Any

import msgspec
import numpy as np
import torch

from .adapters.dtypes import dtype_name, dtype_named
from .commit import read_manifest_bytes
from .coordinate import Coordinator
from .describe import LocalTensor
from .errors import DtypeMismatch, InvalidManifest, MissingNames, ShapeMismatch, StateError
from .exchange import Statement, exchange
from .layout import PerRankShapes, Piece, Replicated
from .options import Options
from .plan import PlannedTensor
from .read import CheckpointFiles, Destination, read_into
from .reshard import FileReads, Want, plan_reads
from .share import SharedRead, SharedWant
from .state import open_target
from .store import Store
from .tables import Described, encode_table, merge_tables
from .tree import StoredIndex, StoredTensor, unflatten
from .validate import Checkpoint, parse_manifest
from .values import Container, decode_value

logger = logging.getLogger("shardckpt")
_PACK = msgspec.msgpack.Encoder()

AMPLIFICATION = 1.05
"""Bytes read per byte needed above which a load reads every block once and passes it on."""


VALUE_LIMIT = 256 << 20
"""Bytes; larger per-rank values are refused before memory is taken for them."""


@dataclass(frozen=True, slots=True)
class RestoreInfo:
    """What a load did, all ranks together."""

    world_size: int
    """Ranks that saved the checkpoint."""
    bytes_needed: int
    """Bytes of tensor data that the targets of all ranks hold."""
    bytes_read: int
    """Bytes of tensor data that were read from storage; each of them was verified."""
    seconds: float
    """Wall time on this rank."""
    read_once: bool
    """Whether each block was read by one rank and passed on."""
    verified: bool
    """Whether every byte that was read matched its digest: always, or the load has raised."""
    missing: tuple[str, ...]
    """Names that the target has and the checkpoint does not (``strict=False``); they keep their values."""
    unexpected: tuple[str, ...]
    """Names that the checkpoint has below the targets' keys and no rank's target does (``strict=False``)."""
    kept: tuple[str, ...]
    """Per-rank names that keep this rank's values, because the checkpoint is of fewer ranks."""
    metadata: Mapping[str, Any]
    """The mapping that was given to the save."""


@dataclass(frozen=True, slots=True)
class Restored:
    """A checkpoint that was loaded."""

    step: int
    """Number of the training step."""
    state: Mapping[str, Any]
    """The target with everything in place; without a target, the whole stored state as plain CPU tensors and values."""
    info: RestoreInfo
    """What the load did."""
    digest: str
    """SHA-256 of the manifest, in hex."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What is to be loaded, and how strictly."""

    keys: Sequence[str] | None = None
    """Shell patterns (``*``, ``?``, ``[...]``) of full names; None is all."""
    strict: bool = True
    """Whether names that are missing or unexpected are an error."""
    convert_dtype: bool = False
    """Whether a target of another dtype is filled with converted values."""
    expect_digest: str | None = None
    """The SHA-256 that the manifest must have."""

    def takes(self, name: str) -> bool:
        """Whether ``name`` is to be loaded."""
        return self.keys is None or any(fnmatchcase(name, pattern) for pattern in self.keys)


class _Reads(msgspec.Struct):
    """What one rank says of its target. Stored names are told as one bit each, in order."""

    needed: int
    direct: int
    missing: tuple[str, ...]
    used: bytes
    unexpected: bytes


class _Decision(msgspec.Struct):
    needed: int
    share: bool
    unexpected: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Target:
    """What one rank loads into."""

    wanted: Sequence[LocalTensor]
    finish: Callable[[], Mapping[str, Any]]
    missing: Sequence[str] = ()
    used: Collection[str] = ()
    unexpected: Collection[str] = ()
    kept: Sequence[str] = ()


class Load:
    """One load, on one rank; collective."""

    def __init__(self, coordinator: Coordinator, store: Store, prefix: str, selection: Selection, options: Options) -> None:
        self._begun = perf_counter()
        self._coordinator = coordinator
        self._store = store
        self._prefix = prefix
        self._selection = selection
        self._options = options
        checkpoints: list[Checkpoint] = []

        def read_manifest() -> bytes:
            data = read_manifest_bytes(store, prefix, selection.expect_digest)
            checkpoints.append(parse_manifest(data))
            return data

        data = coordinator.broadcast("load: manifest", read_manifest)
        self._checkpoint = checkpoints[0] if checkpoints else parse_manifest(data)
        self._plan = self._checkpoint.plan
        self._files = CheckpointFiles(store, prefix, self._checkpoint)

    def run(self, state: Mapping[str, Any] | None) -> Restored:
        """Load into ``state`` in place, or, when it is None, into a new state of plain CPU tensors."""
        with self._files:
            return self._run(state)

    def _run(self, state: Mapping[str, Any] | None) -> Restored:
        coordinator = self._coordinator
        targets: list[_Target] = []
        wants: list[Want] = []
        destinations: dict[int, Destination] = {}
        reads: list[FileReads] = []

        def prepare() -> bytes:
            targets.append(self._make_target() if state is None else self._open_target(state))
            for leaf in targets[0].wanted:
                wants.append(self._want(len(wants), leaf))
                destinations[len(destinations)] = Destination(leaf.data, wants[-1].piece)
            reads.extend(plan_reads(self._plan, wants))
            needed = sum(want.piece.numel * want.tensor.itemsize for want in wants)
            used, unexpected = self._mark(targets[0].used), self._mark(targets[0].unexpected)
            missing = tuple(targets[0].missing)
            return _PACK.encode(_Reads(needed, sum(file.nbytes for file in reads), missing, used, unexpected))

        packed = coordinator.round("load: target", prepare, self._decide)
        decision = msgspec.msgpack.decode(packed, type=_Decision)
        shared = self._share(targets[0].wanted, wants, destinations) if decision.share else None

        def read() -> bytes:
            if shared is not None:
                shared.run()
                direct = plan_reads(self._plan, [want for want in wants if want.rank is not None])
            else:
                direct = reads
            read_into(self._files, direct, destinations, workers=self._options.workers)
            return _PACK.encode(self._files.bytes_read)

        def total(payloads: list[bytes]) -> bytes:
            return _PACK.encode(sum(msgspec.msgpack.decode(payload, type=int) for payload in payloads))

        bytes_read = msgspec.msgpack.decode(coordinator.round("load: read", read, total), type=int)
        restored: list[Mapping[str, Any]] = []

        def finish() -> bytes:
            restored.append(targets[0].finish())
            return b""

        coordinator.round("load: put back", finish)
        return self._report(targets[0], restored[0], decision, bytes_read)

    def _decide(self, payloads: list[bytes]) -> bytes:
        """On rank 0: whether the names fit, and whether to read every block once and pass it on."""
        reads = [msgspec.msgpack.decode(payload, type=_Reads) for payload in payloads]
        unexpected = self._check_names(reads)
        needed, direct = sum(r.needed for r in reads), sum(r.direct for r in reads)
        wasteful = direct > AMPLIFICATION * needed
        repeated = self._coordinator.num_hosts > 1 and direct > AMPLIFICATION * self._plan.total_bytes
        share = {"auto": wasteful or repeated, "always": True, "never": False}[self._options.read_once]
        return _PACK.encode(_Decision(needed, share and self._coordinator.world_size > 1, unexpected))

    def _check_names(self, reads: Sequence[_Reads]) -> tuple[str, ...]:
        """Names that some rank does not expect and no rank uses: pipeline stages hold different ones."""
        used = np.bitwise_or.reduce([np.frombuffer(r.used, np.uint8) for r in reads])
        unexpected = np.bitwise_or.reduce([np.frombuffer(r.unexpected, np.uint8) for r in reads])
        extra = tuple(self._names[at] for at in np.unpackbits(unexpected & ~used, count=len(self._names)).nonzero()[0])
        missing = sorted({name for r in reads for name in r.missing})
        problems = [f"missing in the checkpoint: {_some(missing)}"] if missing else []
        problems += [f"in the checkpoint but not in the target: {_some(extra)}"] if extra else []
        if problems and self._selection.strict:
            raise MissingNames(
                f"{'; '.join(problems)}. Load with strict=False to leave these out, or choose names with keys=",
                missing=missing,
                unexpected=list(extra),
            )
        return extra

    def _mark(self, chosen: Collection[str]) -> bytes:
        """One bit for each stored name: whether it is in ``chosen``."""
        found = set(chosen)
        return np.packbits(np.array([name in found for name in self._names], dtype=bool)).tobytes()

    @cached_property
    def _names(self) -> list[str]:
        """All stored names, in an order that is the same on all ranks."""
        manifest = self._checkpoint.manifest
        return sorted([*manifest.tensors, *manifest.objects])

    def _report(self, target: _Target, state: Mapping[str, Any], decision: _Decision, bytes_read: int) -> Restored:
        manifest = self._checkpoint.manifest
        info = RestoreInfo(
            world_size=manifest.world_size,
            bytes_needed=decision.needed,
            bytes_read=bytes_read,
            seconds=perf_counter() - self._begun,
            read_once=decision.share,
            verified=True,
            missing=tuple(target.missing),
            unexpected=decision.unexpected,
            kept=tuple(target.kept),
            metadata=decode_value(manifest.metadata, "metadata"),
        )
        logger.info("loaded %s/%s: %.3f GB read in %.2f s", self._store.url, self._prefix, bytes_read / 1e9, info.seconds)
        return Restored(manifest.step, state, info, self._checkpoint.digest)

    # ---- targets

    def _open_target(self, state: Mapping[str, Any]) -> _Target:
        target = open_target(state, self._index(), select=self._selection.takes)
        return _Target(target.wanted, target.finish, target.missing, target.used, target.unexpected, target.kept)

    def _make_target(self) -> _Target:
        """A whole new state. What each rank saved for itself stands in it as a dict by rank."""
        self._files.require_sizes()
        leaves: dict[str, Any] = {}
        wanted = []
        for tensor in self._plan.tensors:
            if not self._selection.takes(tensor.name):
                continue
            if isinstance(tensor.layout, PerRankShapes):
                ranks = [r for r in range(self._plan.world_size) if tensor.layout.shape_of(r) is not None]
                if tensor.is_value:
                    found = {rank: self._read_value(tensor, rank) for rank in ranks}
                    if not any(isinstance(value, Container) for value in found.values()):
                        leaves[tensor.name] = found
                    continue
                by_rank = {
                    rank: torch.empty(tensor.layout.shape_of(rank) or (), dtype=dtype_named(tensor.dtype)) for rank in ranks
                }
                wanted += [LocalTensor(tensor.name, t, Replicated(tuple(t.shape)), source_rank=r) for r, t in by_rank.items()]
                leaves[tensor.name] = by_rank
            else:
                whole = torch.empty(tensor.shape, dtype=dtype_named(tensor.dtype))
                wanted.append(LocalTensor(tensor.name, whole, Replicated(tensor.shape)))
                leaves[tensor.name] = whole
        index = self._index()
        leaves |= {name: value for name, value in index.values.items() if self._selection.takes(name)}
        for name, canonical in index.aliases.items():
            if self._selection.takes(name) and canonical in leaves:
                leaves[name] = leaves[canonical]
        return _Target(wanted, lambda: unflatten(leaves, index.containers))

    def _index(self) -> StoredIndex:
        """What the checkpoint holds, as this rank needs to know it before any tensor is read."""
        manifest, rank = self._checkpoint.manifest, self._coordinator.rank
        values = (
            [t for t in self._plan.tensors if t.is_value and t.stored(rank) is not None] if rank < manifest.world_size else []
        )
        return StoredIndex(
            world_size=manifest.world_size,
            tensors={t.name: StoredTensor(t.dtype, t.layout) for t in self._plan.tensors if not t.is_value},
            aliases=self._plan.aliases,
            values={name: decode_value(value, name) for name, value in manifest.objects.items()},
            per_rank_values={t.name: self._read_value(t, rank) for t in values},
            containers=_decode_containers(manifest.containers),
        )

    def _read_value(self, tensor: PlannedTensor, rank: int) -> Any:
        """A value that ``rank`` saved for itself."""
        piece = tensor.stored(rank)
        if piece is None:
            raise InvalidManifest(f"invalid manifest: value {tensor.name!r} of rank {rank} is empty", name=tensor.name)
        if piece.numel > VALUE_LIMIT:
            raise InvalidManifest(f"invalid manifest: value {tensor.name!r} has {piece.numel} bytes", name=tensor.name)
        text = torch.empty(piece.numel, dtype=torch.uint8)
        reads = plan_reads(self._plan, [Want(0, tensor, piece, rank)])
        read_into(self._files, reads, {0: Destination(text, piece)}, workers=1)
        try:
            return decode_value(msgspec.json.decode(text.numpy().tobytes()), tensor.name)
        except msgspec.DecodeError as error:
            raise InvalidManifest(f"value {tensor.name!r} of rank {rank} is not JSON: {error}", name=tensor.name) from None

    def _want(self, key: int, leaf: LocalTensor) -> Want:
        tensor = self._plan.by_name[leaf.name]
        self._check_fit(tensor, leaf)
        if leaf.source_rank is not None:
            piece: Piece | None = Piece.box((0,) * leaf.data.dim(), tuple(leaf.data.shape))
        else:
            piece = leaf.layout.piece(self._coordinator.rank)
        if piece is None:
            raise StateError(f"{leaf.name!r}: its layout gives rank {self._coordinator.rank} nothing", name=leaf.name)
        if piece.is_window and not leaf.data.is_contiguous():
            raise StateError(f"{leaf.name!r}: a flat slice has to be contiguous to be loaded into", name=leaf.name)
        return Want(key, tensor, piece, leaf.source_rank)

    def _check_fit(self, tensor: PlannedTensor, leaf: LocalTensor) -> None:
        stored_shape = tensor.shape
        if isinstance(tensor.layout, PerRankShapes) and leaf.source_rank is not None:
            stored_shape = tensor.layout.shape_of(leaf.source_rank) or ()
        if stored_shape != leaf.layout.shape:
            raise ShapeMismatch(
                f"{leaf.name!r} has shape {list(stored_shape)} in the checkpoint and {list(leaf.layout.shape)} in the "
                "target. Build the model with the stored shape, or leave the name out with keys=",
                name=leaf.name,
                stored=list(stored_shape),
                target=list(leaf.layout.shape),
            )
        target_dtype = dtype_name(leaf.data.dtype)
        if target_dtype != tensor.dtype and not self._selection.convert_dtype:
            raise DtypeMismatch(
                f"{leaf.name!r} is {tensor.dtype} in the checkpoint and {target_dtype} in the target. "
                "Load with convert_dtype=True to convert, or build the target with the stored dtype",
                name=leaf.name,
                stored=tensor.dtype,
                target=target_dtype,
            )

    # ---- reading once

    def _share(
        self, wanted: Sequence[LocalTensor], wants: Sequence[Want], destinations: Mapping[int, Destination]
    ) -> SharedRead:
        """Make all ranks know what all ranks want, and plan the turns."""
        described: list[Described] = []
        mine: dict[str, Destination] = {}
        times: Counter[str] = Counter()
        for leaf, want in zip(wanted, wants, strict=True):
            if want.rank is None:
                # a name may be wanted more than once (tied weights that are not tied here): each time is a want of its own
                name = f"{times[leaf.name]}:{leaf.name}"
                times[leaf.name] += 1
                described.append(Described(name, want.tensor.dtype, leaf.layout))
                mine[name] = destinations[want.key]
        exchanged = exchange(self._coordinator, "load: share", lambda: Statement(encode_table((), described), {}, {}))
        merged = merge_tables(exchanged.tables or (), exchanged.table_of, exchanged.shapes)
        shared = [
            SharedWant(key, self._plan.by_name[tensor.name.partition(":")[2]], tensor.layout)
            for key, tensor in enumerate(merged)
            if tensor.layout is not None
        ]
        by_key = {key: mine[tensor.name] for key, tensor in enumerate(merged) if tensor.name in mine}
        return SharedRead(self._files, self._plan, shared, by_key, self._coordinator.exchange_group())


def _decode_containers(records: Mapping[str, Any]) -> dict[str, Container]:
    decoded = {name: decode_value(record, name) for name, record in records.items()}
    for name, container in decoded.items():
        if not isinstance(container, Container):
            raise InvalidManifest(f"invalid manifest: containers: {name!r} is not a container", name=name)
    return decoded


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:8])
    return shown if len(names) <= 8 else f"{shown}, ... {len(names)} in all"
