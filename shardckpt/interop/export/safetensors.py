# SPDX-License-Identifier: Apache-2.0
"""Weights in the Hugging Face layout: safetensors files of limited size, and an index that says which tensor is where.

https://huggingface.co/docs/safetensors and ``save_torch_state_dict`` of huggingface_hub: one shard is ``model.safetensors``;
several are ``model-00001-of-00003.safetensors`` and so on, with ``model.safetensors.index.json``. Tied weights are stored once,
and the file's metadata has ``{other name: stored name}`` of them, as ``safetensors.torch.save_model`` writes it:
``safetensors.torch.load_model`` takes that, and transformers ties the others again when it has built the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from shardckpt.errors import ConfigError, ExportRefused
from shardckpt.layout import ITEMSIZE, PerRankShapes, has_safetensors_code, safetensors_code
from shardckpt.maintain.parts import Leaf
from shardckpt.maintain.stored import Progress, StoredCheckpoint, no_progress
from shardckpt.manifest import encode_canonical
from shardckpt.plan import PlannedTensor
from shardckpt.store.outside import OutDirectory, new_directory, require_free, require_local, require_only
from shardckpt.tree import split

from .content import Content, ContentReader, is_floating, whole
from .report import Counted
from .state import named_tensors

INDEX = "model.safetensors.index.json"
_WRITTEN = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors|model\.safetensors\.index\.json", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file."""

    file: str
    """Its name."""
    bytes: int
    """Of its tensors."""
    tensors: tuple[str, ...]
    """Their names, in the order in which they lie in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsExport:
    """What was, or would be, written."""

    path: str
    """The directory."""
    source: str
    """The checkpoint."""
    step: int
    """Number of the training step."""
    bytes: int
    """Of tensors, in all files."""
    shards: tuple[Shard, ...]
    """The files."""
    tied: dict[str, str]
    """Names of tied weights that are not stored, and the names that their weights are stored under."""
    left_out: tuple[str, ...]
    """Names below the key that are no tensors."""
    written: bool
    """Whether it was."""


@dataclass(frozen=True, slots=True)
class _Weights:
    tensors: dict[str, Content]
    tied: dict[str, str]
    left_out: tuple[str, ...]


def export_safetensors(
    stored: StoredCheckpoint,
    path: str,
    *,
    key: str = "model",
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    replace: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> SafetensorsExport:
    """Write the weights below ``key`` into the directory ``path``, floating-point ones as ``dtype`` if one is given.

    Shards hold at most ``max_shard_bytes`` bytes of tensors, or one tensor. Holds some 100 MB at most. Raises `AlreadyExists`
    unless ``replace`` (and always for a directory that holds other things too), `ExportRefused`, `ConfigError`,
    `IntegrityError` and `StoreError`; then nothing was written.
    """
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes={max_shard_bytes}: a shard has at least one byte")
    require_local(path)
    require_free(path, replace=replace)
    require_only(path, _WRITTEN)
    weights = _find_weights(stored, key, dtype)
    shards = cut_shards(weights.tensors, max_shard_bytes)
    counted = Counted(progress)
    total = counted.expect(weights.tensors.values())
    if not dry_run:
        with ContentReader(stored, counted.add) as reader, new_directory(path, replace=replace) as directory:
            for shard in shards:
                _write_shard(directory, shard, weights, reader)
            if len(shards) > 1:
                _write_index(directory, shards, total)
    return SafetensorsExport(
        path=path,
        source=stored.url,
        step=stored.checkpoint.manifest.step,
        bytes=total,
        shards=tuple(shards),
        tied=weights.tied,
        left_out=weights.left_out,
        written=not dry_run,
    )


def _find_weights(stored: StoredCheckpoint, key: str, dtype: str | None) -> _Weights:
    plan, manifest = stored.checkpoint.plan, stored.checkpoint.manifest
    below = f"{key}/"
    tensors: dict[str, Content] = {}
    left_out = [name for name in manifest.objects if name.startswith(below)]
    tied: dict[str, str] = {}
    for tensor, every in named_tensors(plan):
        names = [name for name in every if name.startswith(below)]
        if names and isinstance(tensor.layout, PerRankShapes):
            left_out += names
        elif names:
            first, *others = (_weight_name(name, key) for name in names)
            _check(first, tensor, (*tensors, *tied))
            is_converted = dtype is not None and is_floating(tensor.dtype)
            tensors[first] = whole(Leaf(tensor), dtype if is_converted else None)
            tied |= dict.fromkeys(others, first)
    if not tensors:
        raise ExportRefused(
            f"{stored.url} has no tensor below {key!r}: say with --key where the model is; shardckpt show lists all names",
            key=key,
        )
    return _Weights(tensors, tied, tuple(sorted(left_out)))


def _weight_name(name: str, key: str) -> str:
    """A name in the checkpoint as a state_dict has it: without the key, the parts of nested mappings joined with dots."""
    return ".".join(split(name.removeprefix(f"{key}/")))


def _check(name: str, tensor: PlannedTensor, taken: Collection[str]) -> None:
    if name in taken or name == "__metadata__":
        raise ExportRefused(
            f"{tensor.name!r} would be called {name!r}, which is taken: rename it in the model", name=tensor.name
        )
    if not has_safetensors_code(tensor.dtype):
        raise ExportRefused(
            f"{tensor.name!r} is {tensor.dtype}, which safetensors has no code for: use export torch", name=tensor.name
        )


def cut_shards(tensors: dict[str, Content], most: int) -> list[Shard]:
    """Deal tensors out to files in their order, each file with at most ``most`` bytes, or with one tensor that has more."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, content in tensors.items():
        if groups[-1] and size + content.nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += content.nbytes
    count = len(groups)
    shards = []
    for number, names in enumerate(groups, 1):
        file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        # the widest elements first, so that all of them are aligned, as safetensors' own writer does it
        ordered = tuple(sorted(names, key=lambda name: (-ITEMSIZE[tensors[name].dtype], name)))
        shards.append(Shard(file=file, bytes=sum(tensors[name].nbytes for name in names), tensors=ordered))
    return shards


def _write_shard(directory: OutDirectory, shard: Shard, weights: _Weights, reader: ContentReader) -> None:
    contents = [weights.tensors[name] for name in shard.tensors]
    with directory.file(shard.file) as file:
        file.write(_header(shard.tensors, contents, weights.tied))
        for _, chunk in reader.stream(contents):
            file.write(chunk)


def _header(names: Sequence[str], contents: Sequence[Content], tied: dict[str, str]) -> bytes:
    stored = set(names)
    here = {other: name for other, name in tied.items() if name in stored}
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **here}}
    offset = 0
    for name, content in zip(names, contents, strict=True):
        code, _ = safetensors_code(content.dtype)
        entries[name] = {"dtype": code, "shape": content.shape, "data_offsets": [offset, offset + content.nbytes]}
        offset += content.nbytes
    text = encode_canonical(entries)
    length = -(-len(text) // 8) * 8
    return length.to_bytes(8, "little") + text.ljust(length)


def _write_index(directory: OutDirectory, shards: Sequence[Shard], total: int) -> None:
    weight_map = {name: shard.file for shard in shards for name in shard.tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    with directory.file(INDEX) as file:
        file.write(f"{json.dumps(index, indent=2)}\n".encode())
