# SPDX-License-Identifier: Apache-2.0
"""Content digests that do not depend on the layout: equal for equal states, whatever world size, mesh or placement saved them.

The digest of a tensor is the xxh3-128 of its bytes in global row-major order. The digest of a checkpoint is that of the
canonical JSON of all names with what they stand for. An alias stands for the tensor that it names. What ranks saved each
for itself, such as the state of random generators, exists once per rank and so depends on the world size: it is left out of
the total unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import xxhash

from shardckpt.manifest import encode_canonical

from .contents import matches, require_matches
from .parts import MEMORY, Leaf, Part, PartReader, check_memory, choose_rounds, cut_batches, list_leaves
from .stored import Progress, StoredCheckpoint, no_progress


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDigest:
    """The content of one tensor."""

    name: str
    """Full name in the state tree."""
    rank: int | None
    """The rank that saved it for itself; None for a tensor of all ranks."""
    dtype: str
    """Name of the element type."""
    shape: tuple[int, ...]
    """Global shape, or that of the rank's own tensor."""
    digest: str
    """xxh3-128 of its bytes, in hex."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentDigest:
    """The content of a checkpoint."""

    path: str
    """Where it is; `shardckpt.load` takes it."""
    step: int
    """Number of the training step."""
    digest: str
    """Digest of everything that was chosen, 32 hex digits."""
    tensors: tuple[TensorDigest, ...]
    """Tensors and aliases of all ranks, by name."""
    per_rank: tuple[TensorDigest, ...]
    """Tensors and values that ranks saved each for itself, by name and rank."""
    per_rank_included: bool
    """Whether ``digest`` covers those."""
    values: int
    """How many values of all ranks ``digest`` covers."""
    bytes_read: int
    """Bytes that were read from storage; each was verified."""


def digest_content(
    stored: StoredCheckpoint,
    *,
    keys: Sequence[str] | None = None,
    per_rank: bool = False,
    memory: int = MEMORY,
    progress: Progress = no_progress,
) -> ContentDigest:
    """Digest a checkpoint, or the names that match one of the shell patterns ``keys``.

    Holds at most about ``memory`` bytes. Raises `IntegrityError`, `StoreError`, and `MissingNames` for a pattern that matches
    nothing.
    """
    require_matches(keys, stored)
    plan = stored.checkpoint.plan
    chosen = {name: plan.aliases.get(name, name) for name in (*plan.by_name, *plan.aliases) if matches(name, keys)}
    leaves = list_leaves(plan, chosen.values(), per_rank=True)
    by_name: dict[str, list[TensorDigest]] = {}
    memory = check_memory(memory)
    rounds = choose_rounds([(plan, leaves)], memory)
    with PartReader(stored) as reader:
        for found in _digest_leaves(reader, leaves, cut_batches(leaves, memory, rounds), progress):
            by_name.setdefault(found.name, []).append(found)
        bytes_read = reader.bytes_read
    digests = [replace(found, name=name) for name in sorted(chosen) for found in by_name.get(chosen[name], ())]
    values = [item for item in _canonical_values(stored) if matches(item[0], keys)]
    covered = [found for found in digests if per_rank or found.rank is None]
    entries = [[d.name, "tensor", d.rank, d.dtype, d.shape, d.digest] for d in covered]
    return ContentDigest(
        path=stored.url,
        step=stored.checkpoint.manifest.step,
        digest=xxhash.xxh3_128_hexdigest(encode_canonical([entries, values])),
        tensors=tuple(found for found in digests if found.rank is None),
        per_rank=tuple(found for found in digests if found.rank is not None),
        per_rank_included=per_rank,
        values=sum(kind == "value" for _, kind, _ in values),
        bytes_read=bytes_read,
    )


def _digest_leaves(
    reader: PartReader, leaves: Sequence[Leaf], batches: Iterable[Sequence[Part]], progress: Progress
) -> list[TensorDigest]:
    """The digests of all leaves, in their order; ``batches`` are theirs."""
    total = sum(leaf.nbytes for leaf in leaves)
    done = 0
    hashers = [xxhash.xxh3_128() for _ in leaves]
    for batch in batches:
        for part, data in zip(batch, reader.read(batch), strict=True):
            hashers[part.number].update(data.data)
            done += part.nbytes
        progress(done, total)
    return [
        TensorDigest(
            name=leaf.tensor.name, rank=leaf.rank, dtype=leaf.tensor.dtype, shape=leaf.shape, digest=hasher.hexdigest()
        )
        for leaf, hasher in zip(leaves, hashers, strict=True)
    ]


def _canonical_values(stored: StoredCheckpoint) -> list[tuple[str, str, Any]]:
    """(name, kind, encoded value) of values and containers, sorted."""
    manifest = stored.checkpoint.manifest
    values = [(name, "value", value) for name, value in manifest.objects.items()]
    containers = [(name, "container", record) for name, record in manifest.containers.items()]
    return sorted(values + containers, key=lambda item: item[:2])
