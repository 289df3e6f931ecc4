# SPDX-License-Identifier: Apache-2.0
"""What a load fills: the caller's state, or a new one of plain CPU tensors; and whether the checkpoint fits it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import msgspec
import torch

from .adapters.dtypes import dtype_name, dtype_named
from .describe import LocalTensor
from .errors import ConfigError, DtypeMismatch, InvalidManifest, ShapeMismatch, StateError
from .layout import PerRankShapes, Piece, Replicated
from .plan import PlannedTensor
from .read import CheckpointFiles, Destination, read_into
from .reshard import Want, plan_reads
from .state import open_target
from .tree import StoredIndex, StoredTensor, decode_containers, unflatten
from .validate import Checkpoint
from .values import Container, decode_value

_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII | re.IGNORECASE)
VALUE_LIMIT = 256 << 20
"""Bytes; larger per-rank values are refused before memory is taken for them."""


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

    def __post_init__(self) -> None:
        for name in ("strict", "convert_dtype"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not True or False")
        digest = self.expect_digest
        if digest is not None and not (isinstance(digest, str) and _DIGEST.fullmatch(digest)):
            raise ConfigError(
                f"expect_digest={digest!r} is not the SHA-256 of a manifest, 64 hex digits. Saved.digest is that, and "
                "shardckpt show prints it (shardckpt digest prints another one)"
            )
        keys = self.keys
        if keys is None or (isinstance(keys, Collection) and not isinstance(keys, str) and all(type(k) is str for k in keys)):
            return
        # one pattern as a plain str would be taken letter by letter, and its "*" for everything
        raise ConfigError(f"keys={keys!r} is not a list of patterns; write keys=['model/*']")

    def takes(self, name: str) -> bool:
        """Whether ``name`` is to be loaded."""
        return self.keys is None or any(fnmatchcase(name, pattern) for pattern in self.keys)


@dataclass(frozen=True, slots=True)
class LoadTarget:
    """What one rank loads into."""

    wanted: Sequence[LocalTensor]
    """Memory to fill."""
    finish: Callable[[], Mapping[str, Any]]
    """Puts values back, once all memory is filled, and returns the state."""
    missing: Sequence[str] = ()
    """Names that it has and the checkpoint does not."""
    used: Collection[str] = ()
    """Stored names that it takes."""
    unexpected: Collection[str] = ()
    """Stored names below its keys that it has no place for."""
    kept: Sequence[str] = ()
    """Per-rank names that stay as they are."""


class Targets:
    """Makes and opens targets for one checkpoint, on one rank."""

    def __init__(self, checkpoint: Checkpoint, files: CheckpointFiles, rank: int, selection: Selection) -> None:
        self._checkpoint = checkpoint
        self._plan = checkpoint.plan
        self._files = files
        self._rank = rank
        self._selection = selection
        self.metadata: Mapping[str, Any] = decode_value(checkpoint.manifest.metadata, "metadata")
        """The mapping that was given to the save; decoded before anything is put into a target."""

    def open(self, state: Mapping[str, Any]) -> LoadTarget:
        """A state of the caller's, to be filled in place."""
        target = open_target(state, self._index(), select=self._selection.takes)
        return LoadTarget(target.wanted, target.finish, target.missing, target.used, target.unexpected, target.kept)

    def make(self) -> LoadTarget:
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
        return LoadTarget(wanted, lambda: unflatten(leaves, index.containers))

    def _index(self) -> StoredIndex:
        """What the checkpoint holds, as this rank needs to know it before any tensor is read."""
        manifest, rank = self._checkpoint.manifest, self._rank
        values = (
            [t for t in self._plan.tensors if t.is_value and t.stored(rank) is not None] if rank < manifest.world_size else []
        )
        return StoredIndex(
            world_size=manifest.world_size,
            tensors={t.name: StoredTensor(t.dtype, t.layout) for t in self._plan.tensors if not t.is_value},
            aliases=self._plan.aliases,
            values={name: decode_value(value, name) for name, value in manifest.objects.items()},
            per_rank_values={t.name: self._read_value(t, rank) for t in values},
            containers=decode_containers(manifest.containers),
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
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise InvalidManifest(f"value {tensor.name!r} of rank {rank} is not JSON: {error}", name=tensor.name) from None

    def want(self, key: int, leaf: LocalTensor) -> Want:
        """What this rank reads for a leaf that a target wants; raises `TargetMismatch` when the stored tensor does not fit."""
        tensor = self._plan.by_name[leaf.name]
        self._check_fit(tensor, leaf)
        if leaf.source_rank is not None:
            piece: Piece | None = Piece.box((0,) * leaf.data.dim(), tuple(leaf.data.shape))
        else:
            piece = leaf.layout.piece(self._rank)
        if piece is None:
            raise StateError(f"{leaf.name!r}: its layout gives rank {self._rank} nothing", name=leaf.name)
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
