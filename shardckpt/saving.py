# SPDX-License-Identifier: Apache-2.0
"""Save: capture the state, describe its layout, plan, write, collect receipts, commit."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import msgspec
import torch
import xxhash

from .adapters.dtypes import dtype_name
from .commit import Contents, already_committed, build_manifest, check_visible, publish
from .coordinate import Coordinator
from .describe import sample_digests
from .errors import CheckpointError, MissingFile, RankTimeout, ReplicaDivergence, StoreError
from .exchange import Exchanged, Statement, exchange
from .layout import MeshLayout, PerRankLayout, Replicate
from .manifest import MANIFEST_NAME, encode_canonical, manifest_digest, rank_file_name
from .options import Options
from .plan import Plan, PlannedTensor, make_plan
from .root import Root
from .stage import wait_for_devices
from .state import Captured, capture
from .store import Store
from .tables import Described, encode_table, merge_tables, per_rank_shapes
from .values import encode_value
from .write import Receipt, write_rank_file

logger = logging.getLogger("shardckpt")
_PACK = msgspec.msgpack.Encoder()


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


class _Written(msgspec.Struct):
    receipt: Receipt
    samples: dict[str, bytes]


class _Verdict(msgspec.Struct):
    digest: str
    diverging: tuple[str, ...]


class Saver:
    """Saves states to one store, and keeps the plan from save to save as long as the layout stays the same."""

    def __init__(self, coordinator: Coordinator, store: Store, options: Options) -> None:
        self._coordinator = coordinator
        self._store = store
        self._options = options
        self._plan: Plan | None = None
        self._key = b""

    def save(self, prefix: str, step: int, state: Mapping[str, Any], metadata: Mapping[str, Any]) -> Saved:
        """Save ``state`` under ``prefix`` ("" or "step-.../"), and return when it is durable on all ranks."""
        begun = perf_counter()
        tensors: dict[str, torch.Tensor] = {}

        def make_statement() -> Statement:
            if self._coordinator.rank == 0:
                _require_uncommitted(self._store, prefix)
                self._require_place(prefix)
            captured = capture(state)
            described = _describe(captured, tensors)
            return Statement(
                encode_table(sorted(state), described),
                per_rank_shapes(described),
                _encode_values(captured) | {"save:step": step, "save:metadata": encode_value(dict(metadata), "metadata")},
            )

        exchanged = exchange(self._coordinator, "save", make_statement, self._key)
        plan, digest = self._write(prefix, exchanged, tensors)
        saved = Saved(f"{self._store.url}/{prefix}".rstrip("/"), step, digest, plan.total_bytes, perf_counter() - begun)
        gigabytes = saved.bytes / 1e9
        logger.info("saved %s: %.3f GB in %.2f s, %.2f GB/s", saved.url, gigabytes, saved.seconds, gigabytes / saved.seconds)
        return saved

    def _write(self, prefix: str, exchanged: Exchanged, tensors: Mapping[str, torch.Tensor]) -> tuple[Plan, str]:
        """Write this rank's file and commit; on any rank's error every rank removes what it wrote of the attempt."""
        coordinator, store = self._coordinator, self._store
        name = f"{prefix}{rank_file_name(coordinator.rank, exchanged.nonce)}"
        plans: list[Plan] = []

        def write() -> bytes:
            plans.append(self._plan_for(exchanged))
            wait_for_devices(tensors.values())
            samples = _sample_replicas(plans[0], coordinator.rank, tensors)
            receipt = write_rank_file(store, name, plans[0], coordinator.rank, tensors, workers=self._options.workers)
            return _PACK.encode(_Written(receipt, samples))

        def commit(payloads: list[bytes]) -> bytes:
            written = [msgspec.msgpack.decode(payload, type=_Written) for payload in payloads]
            diverging = _find_diverging([w.samples for w in written])
            if diverging:
                return _PACK.encode(_Verdict("", diverging))
            receipts = [w.receipt for w in written]
            check_visible(store, prefix, receipts)
            data = build_manifest(plans[0], receipts, _contents(exchanged))
            publish(store, prefix, data, exchanged.nonce)
            return _PACK.encode(_Verdict(manifest_digest(data), ()))

        try:
            verdict = msgspec.msgpack.decode(coordinator.round("save: write", write, commit), type=_Verdict)
            if verdict.diverging:
                _raise_divergence(coordinator, plans[0], tensors, verdict.diverging)
        except BaseException as error:
            if _is_surely_uncommitted(error):
                _remove_quietly(store, name)
            raise
        return plans[0], verdict.digest

    def _require_place(self, prefix: str) -> None:
        """Look once, before the first save, whether this is the right directory."""
        if self._plan is None:
            Root(self._store).require_place(prefix)

    def _plan_for(self, exchanged: Exchanged) -> Plan:
        """The plan, which is the one of the last save if nothing has changed since."""
        if exchanged.tables is not None or self._plan is None:
            tables = exchanged.tables or ()
            merged = merge_tables(tables, exchanged.table_of, exchanged.shapes)
            self._plan = make_plan(self._coordinator.world_size, merged)
            self._key = exchanged.key
        return self._plan


def _require_uncommitted(store: Store, prefix: str) -> None:
    try:
        store.open(f"{prefix}{MANIFEST_NAME}").close()
    except MissingFile:
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


def _contents(exchanged: Exchanged) -> Contents:
    values = exchanged.values
    return Contents(
        step=values["save:step"],
        attempt=exchanged.nonce,
        objects={name[7:]: value for name, value in values.items() if name.startswith("object:")},
        containers={name[10:]: value for name, value in values.items() if name.startswith("container:")},
        metadata=values["save:metadata"],
        torch=str(torch.__version__),
    )


def _is_surely_uncommitted(error: BaseException) -> bool:
    """Whether files of the attempt may be removed: not when rank 0, which alone commits, may have gone ahead."""
    if isinstance(error, RankTimeout) and 0 in error.details.get("ranks", [0]):
        return False
    return isinstance(error, CheckpointError) and error.details.get("outcome") != "unknown"


def _remove_quietly(store: Store, name: str) -> None:
    try:
        store.delete(name)
    except StoreError as error:
        logger.warning("could not remove %s of a failed save (prune will): %s", name, error)


# ---- replicas


def _replica_groups(plan: Plan, rank: int) -> dict[str, list[PlannedTensor]]:
    """The tensors that other ranks hold equal copies of, by a key that is the same on just those ranks."""
    meshes: dict[object, int] = {}
    groups: dict[str, list[PlannedTensor]] = {}
    for tensor in plan.tensors:
        layout = tensor.layout
        if not isinstance(layout, MeshLayout) or layout.replicas == 1:
            continue
        mesh = meshes.setdefault(layout.mesh, len(meshes))
        at = layout.mesh.coordinate(rank)
        if at is not None:
            cell = [-1 if isinstance(p, Replicate) else c for p, c in zip(layout.placements, at, strict=True)]
            groups.setdefault(f"{mesh}:{cell}", []).append(tensor)
    return groups


def _sample_replicas(plan: Plan, rank: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    """One digest per group of replicated tensors, from a few elements of each; equal on ranks with equal copies."""
    samples = {}
    for key, group in _replica_groups(plan, rank).items():
        digests = sample_digests([tensors[tensor.name] for tensor in group])
        samples[key] = xxhash.xxh3_64_digest(b"".join(digest.to_bytes(8, "big") for digest in digests))
    return samples


def _find_diverging(samples: Sequence[Mapping[str, bytes]]) -> tuple[str, ...]:
    """Keys of the groups whose digests are not equal on all ranks that have them."""
    first: dict[str, bytes] = {}
    diverging = {key: None for mine in samples for key, digest in mine.items() if first.setdefault(key, digest) != digest}
    return tuple(diverging)


def _raise_divergence(coordinator: Coordinator, plan: Plan, tensors: Mapping[str, torch.Tensor], keys: Sequence[str]) -> None:
    """Find the names that differ, and raise `ReplicaDivergence` on all ranks."""

    def sample() -> bytes:
        groups = _replica_groups(plan, coordinator.rank)
        group = groups.get(keys[0], [])
        digests = sample_digests([tensors[tensor.name] for tensor in group])
        return _PACK.encode({tensor.name: digest for tensor, digest in zip(group, digests, strict=True)})

    def compare(payloads: list[bytes]) -> bytes:
        by_rank = [msgspec.msgpack.decode(payload, type=dict[str, int]) for payload in payloads]
        for name in next(filter(None, by_rank)):
            ranks_by_digest: dict[int, list[int]] = {}
            for rank, digests in enumerate(by_rank):
                if name in digests:
                    ranks_by_digest.setdefault(digests[name], []).append(rank)
            if len(ranks_by_digest) > 1:
                sides = " and ".join(f"ranks {ranks}" for ranks in ranks_by_digest.values())
                raise ReplicaDivergence(
                    f"replicated tensor {name!r} differs between {sides}. Replicas have to be equal: look for a missing "
                    "all-reduce or broadcast; a tensor that is meant to differ by rank goes into PerRank(...)",
                    names=[name],
                    ranks=[ranks[0] for ranks in ranks_by_digest.values()],
                )
        raise ReplicaDivergence(
            "replicated tensors differed between ranks while they were saved and are equal now: the state was changed "
            "during the save. Do not change it before save returns",
            names=[],
            ranks=[],
        )

    coordinator.round("save: compare replicas", sample, compare)
