# SPDX-License-Identifier: Apache-2.0
"""Load: read and check the manifest, find out what this rank wants, read, verify, place, put values back."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from time import perf_counter
from typing import Any

import msgspec
import numpy as np

from .commit import read_manifest_bytes
from .coordinate import Coordinator
from .describe import LocalTensor
from .errors import CheckpointError, MissingFile, MissingNames, NotShared
from .events import Sink, Timings
from .exchange import Statement, exchange
from .failure import Failure, common, describe
from .guard import STEP_GUARD
from .layout import FlatLayout
from .options import Options
from .read import CheckpointFiles, Destination, read_into, removed
from .reshard import FileReads, Want, plan_reads
from .share import SharedRead, SharedWant
from .store import Store
from .tables import Described, encode_table, merge_tables
from .targets import LoadTarget, Selection, Targets
from .validate import Checkpoint, parse_manifest
from .wire import name_ranks

logger = logging.getLogger("shardckpt")
_PACK = msgspec.msgpack.Encoder()

AMPLIFICATION = 1.05
"""Bytes read per byte needed above which a load reads every block once and passes it on."""


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
    """Whether every byte that was read matched its digest: always, or the load has raised. Files of DeepSpeed have none."""
    missing: tuple[str, ...]
    """Names that the target has and the checkpoint does not (``strict=False``); they keep their values."""
    unexpected: tuple[str, ...]
    """Names that the checkpoint has below the targets' keys and no rank's target does (``strict=False``)."""
    kept: tuple[str, ...]
    """Per-rank names that keep this rank's values, because the checkpoint is of fewer ranks."""
    metadata: Mapping[str, Any]
    """The mapping that was given to the save."""
    skipped: tuple[tuple[int, str], ...] = ()
    """(step, what is wrong with it) of newer steps that are damaged (``fallback=True``), the newest first."""
    rebuilt: tuple[str, ...] = ()
    """Names of files that were missing or damaged, and of which something was rebuilt from parity."""


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


class _Reads(msgspec.Struct):
    """What one rank says of its target. Stored names are told as one bit each, in order."""

    needed: int
    direct: int
    missing: tuple[str, ...]
    used: bytes
    unexpected: bytes
    is_blind: bool = False


class _Decision(msgspec.Struct):
    needed: int
    share: bool
    unexpected: tuple[str, ...]


class _Done(msgspec.Struct):
    bytes_read: int
    rebuilt: set[str]


class Load:
    """One load, on one rank; collective. What it leaves behind when it fails, it tells."""

    _has_digests = True

    def __init__(
        self,
        coordinator: Coordinator,
        store: Store,
        prefix: str,
        selection: Selection,
        options: Options,
        sink: Sink | None = None,
        refill: Collection[str] = (),
    ) -> None:
        """``refill``: names of the target that hold a part of another checkpoint by now, so that this one has to fill them."""
        self._begun = perf_counter()
        self._timings = Timings()
        self._sink = sink or Sink()
        self._coordinator = coordinator
        self._store = store
        self._prefix = prefix
        self._selection = selection
        self._options = options
        self._refill = refill
        self.manifest = b""
        """The bytes of the manifest, whether they are good or not, on a rank that has read them from the storage."""
        self.filled: set[str] = set()
        """Names of the caller's tensors on this rank that hold something of the checkpoint by now, or all of it."""
        self.failure: Failure | None = None
        """The error of a load that failed, the same on all ranks."""

    def run(self, state: Mapping[str, Any] | None) -> Restored:
        """Load into ``state`` in place, or, when it is None, into a new state of plain CPU tensors.

        Errors have the detail ``partly_filled`` when tensors of the caller's on this rank do not hold what they held before.
        """
        try:
            self._open()
            if state is not None:
                # a save of the same tensors may still be copying them
                STEP_GUARD.wait()
            with self._files:
                return self._run(state)
        except Exception as error:
            self.failure = describe(common(error))
            self._tell_of_mixture(error)
            raise

    def _open(self) -> None:
        checkpoints: list[Checkpoint] = []

        @self._timings.measure("plan")
        def read_manifest() -> bytes:
            try:
                self.manifest = read_manifest_bytes(self._store, self._prefix, self._selection.expect_digest)
            except MissingFile as error:
                # it was there when its place was found
                raise removed(self._store, self._prefix) from error
            checkpoints.append(parse_manifest(self.manifest))
            self._check_patterns(checkpoints[0])
            if self._selection.keys is None:
                # by one listing, before any rank overwrites what its target holds; parts do with the files that they need
                CheckpointFiles(self._store, self._prefix, checkpoints[0]).require_sizes()
            return self.manifest

        data = self._coordinator.broadcast("load: manifest", read_manifest)
        with self._timings.measure("plan"):
            self._checkpoint = checkpoints[0] if checkpoints else parse_manifest(data)
        self._plan = self._checkpoint.plan
        self._files = CheckpointFiles(self._store, self._prefix, self._checkpoint, self._timings, self.filled)
        self._targets = Targets(self._checkpoint, self._files, self._coordinator.rank, self._selection)

    def _run(self, state: Mapping[str, Any] | None) -> Restored:
        coordinator = self._coordinator
        targets: list[LoadTarget] = []
        wants: list[Want] = []
        destinations: dict[int, Destination] = {}
        reads: list[FileReads] = []

        @self._timings.measure("plan")
        def prepare() -> bytes:
            if coordinator.rank != 0 and not self._files.are_visible():
                return _PACK.encode(_Reads(0, 0, (), b"", b"", is_blind=True))
            targets.append(self._targets.make() if state is None else self._targets.open(state))
            self._require_refill(targets[0])
            for leaf in targets[0].wanted:
                wants.append(self._targets.want(len(wants), leaf))
                name = leaf.name if state is not None else ""
                destinations[len(destinations)] = Destination(leaf.data, wants[-1].piece, name)
            reads.extend(plan_reads(self._plan, wants))
            needed = sum(want.piece.numel * want.tensor.itemsize for want in wants)
            used, unexpected = self._mark(targets[0].used), self._mark(targets[0].unexpected)
            missing = tuple(targets[0].missing)
            return _PACK.encode(_Reads(needed, sum(file.nbytes for file in reads), missing, used, unexpected))

        packed = coordinator.round("load: target", prepare, self._decide)
        decision = msgspec.msgpack.decode(packed, type=_Decision)
        wanted = targets[0].wanted
        shared = self._share(wanted, wants, destinations) if decision.share else None

        def read() -> bytes:
            if shared is not None:
                shared.run()
                direct = plan_reads(self._plan, [w for w, leaf in zip(wants, wanted, strict=True) if not _is_shared(leaf)])
            else:
                direct = reads
            read_into(self._files, direct, destinations, workers=self._options.workers)
            return _PACK.encode(_Done(self._files.bytes_read, self._files.rebuilt))

        done = msgspec.msgpack.decode(coordinator.round("load: read", read, _total), type=_Done)
        restored: list[Mapping[str, Any]] = []

        @self._timings.measure("place")
        def finish() -> bytes:
            restored.append(targets[0].finish())
            return b""

        coordinator.round("load: put back", finish)
        return self._report(targets[0], restored[0], decision, done)

    def _tell_of_mixture(self, error: Exception) -> None:
        """Name the tensors that an error leaves with something of this checkpoint."""
        names = sorted(self.filled)
        if not names:
            return
        warning = (
            f"On rank {self._coordinator.rank} {_some(names)} were filled before, wholly or in part: the target now "
            "holds a mixture and must not be trained on. Restore an intact step into it, or build it anew"
        )
        if isinstance(error, CheckpointError):
            error.add(warning, partly_filled=names)
        else:
            logger.error("%s/%s: %s", self._store.url, self._prefix, warning)

    def _require_refill(self, target: LoadTarget) -> None:
        """Refuse to leave tensors with a part of another checkpoint."""
        left = sorted(set(self._refill) - {leaf.name for leaf in target.wanted})
        if left:
            raise MissingNames(
                f"{_some(left)}: filled in part from a newer step that turned out to be damaged, and not in "
                f"{self._store.url}/{self._prefix}, so they would hold a mixture. Build the target anew, and restore this step "
                "by number",
                missing=left,
                unexpected=[],
            )

    def _decide(self, payloads: list[bytes]) -> bytes:
        """On rank 0: whether the names fit, and whether to read every block once and pass it on."""
        reads = [msgspec.msgpack.decode(payload, type=_Reads) for payload in payloads]
        self._require_seen([rank for rank, one in enumerate(reads) if one.is_blind])
        unexpected = self._check_names(reads)
        needed, direct = sum(r.needed for r in reads), sum(r.direct for r in reads)
        wasteful = direct > AMPLIFICATION * needed
        repeated = self._coordinator.num_hosts > 1 and direct > AMPLIFICATION * self._plan.total_bytes
        share = {"auto": wasteful or repeated, "always": True, "never": False}[self._options.read_once]
        return _PACK.encode(_Decision(needed, share and self._coordinator.world_size > 1, unexpected))

    def _require_seen(self, blind: list[int]) -> None:
        """Tell ranks that see nothing of the checkpoint from a checkpoint that is being removed: of that, nobody does."""
        if not blind:
            return
        error = NotShared(
            f"{self._store.url}/{self._prefix} is there for rank 0, and is not there for "
            f"{name_ranks(blind, self._coordinator.hosts)}: the directory is not shared between the hosts. Load from a file "
            "system that all ranks share, mounted at this place on each host, or bring the whole checkpoint to each",
            ranks=blind,
        )
        self._files.require_committed(error)
        raise error

    def _check_patterns(self, checkpoint: Checkpoint) -> None:
        """A pattern that matches nothing is most likely misspelt."""
        names = [*checkpoint.manifest.tensors, *checkpoint.manifest.objects]
        idle = [p for p in self._selection.keys or () if not any(fnmatchcase(name, p) for name in names)]
        if idle and self._selection.strict:
            raise MissingNames(
                f"keys={idle}: no name in the checkpoint matches. Names look like {_some(sorted(names)[:3])}; "
                "load with strict=False to go on without",
                missing=idle,
                unexpected=[],
            )

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

    def _report(self, target: LoadTarget, state: Mapping[str, Any], decision: _Decision, done: _Done) -> Restored:
        manifest, bytes_read = self._checkpoint.manifest, done.bytes_read
        info = RestoreInfo(
            world_size=manifest.world_size,
            bytes_needed=decision.needed,
            bytes_read=bytes_read,
            seconds=perf_counter() - self._begun,
            read_once=decision.share,
            verified=self._has_digests,
            missing=tuple(target.missing),
            unexpected=decision.unexpected,
            kept=tuple(target.kept),
            metadata=self._targets.metadata,
            rebuilt=tuple(sorted(done.rebuilt)),
        )
        url, gigabytes = f"{self._store.url}/{self._prefix}".rstrip("/"), bytes_read / 1e9
        speed = gigabytes / info.seconds
        logger.info("loaded %s: %.3f GB read in %.2f s, %.2f GB/s (%s)", url, gigabytes, info.seconds, speed, self._timings)
        self._sink.report("load", manifest.step, self._coordinator.rank, self._timings)
        return Restored(manifest.step, state, info, self._checkpoint.digest)

    def _share(
        self, wanted: Sequence[LocalTensor], wants: Sequence[Want], destinations: Mapping[int, Destination]
    ) -> SharedRead:
        """Make all ranks know what all ranks want, and plan the turns."""
        described: list[Described] = []
        mine: dict[str, Destination] = {}
        times: Counter[str] = Counter()
        for leaf, want in zip(wanted, wants, strict=True):
            if _is_shared(leaf):
                # a name may be wanted more than once (tied weights that are not tied here): each time is a want of its own
                name = f"{times[leaf.name]}:{leaf.name}"
                times[leaf.name] += 1
                described.append(Described(name, want.tensor.dtype, leaf.layout))
                mine[name] = destinations[want.key]
        with self._timings.measure("exchange"):
            exchanged = exchange(self._coordinator, "load: share", lambda: Statement(encode_table((), described), {}, {}))
        merged = merge_tables(exchanged.tables or (), exchanged.table_of, exchanged.shapes)
        shared = [
            SharedWant(key, self._plan.by_name[tensor.name.partition(":")[2]], tensor.layout)
            for key, tensor in enumerate(merged)
            if tensor.layout is not None
        ]
        by_key = {key: mine[tensor.name] for key, tensor in enumerate(merged) if tensor.name in mine}
        return SharedRead(self._files, self._plan, shared, by_key, self._coordinator.exchange_group())


def _total(payloads: list[bytes]) -> bytes:
    done = [msgspec.msgpack.decode(payload, type=_Done) for payload in payloads]
    return _PACK.encode(_Done(sum(one.bytes_read for one in done), {name for one in done for name in one.rebuilt}))


def _is_shared(leaf: LocalTensor) -> bool:
    """Whether a leaf can be read once for all ranks. Flat slices may overlap between replica groups, and are contiguous."""
    return leaf.source_rank is None and not isinstance(leaf.layout, FlatLayout)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:8])
    return shown if len(names) <= 8 else f"{shown}, ... {len(names)} in all"
