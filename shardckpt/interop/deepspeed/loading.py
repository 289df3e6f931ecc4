# SPDX-License-Identifier: Apache-2.0
"""A load whose source is a directory of DeepSpeed: the engine's own, with the storages in the place of rank files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import torch

from ...coordinate import Coordinator
from ...loading import Load, Restored
from ...manifest import FORMAT, VERSION, Manifest, TensorRecord
from ...options import Options
from ...state import Whereabouts, capture
from ...store import Store, open_store
from ...targets import Selection, Targets
from ...validate import Checkpoint
from ...values import encode_value
from .contents import Contents, read_contents
from .reading import BLOCK, SourceFiles, SourcePlan, Sources, number_sources


class _Index(msgspec.Struct):
    """What rank 0 has found, for all ranks."""

    sources: Sources
    aliases: dict[str, str]
    objects: dict[str, Any]
    containers: dict[str, Any]
    step: int
    tag: str
    world_size: int


def load(
    path: str | os.PathLike[str],
    into: Mapping[str, Any] | None = None,
    *,
    tag: str | None = None,
    keys: Sequence[str] | None = None,
    strict: bool = True,
    convert_dtype: bool = False,
    options: Options | None = None,
) -> Restored:
    """Load what DeepSpeed saved in the directory ``path`` straight into ``into``, on any world size; collective.

    ``path`` is what was given to ``save_checkpoint`` (then ``tag``, or the file ``latest``, says which), or the directory of a
    tag, of a universal checkpoint too. The names are those that plain training has: ``model/...`` are the fp32 master weights,
    ``optimizer/...`` their state, so ``into={"model": model, "optimizer": optimizer}`` is filled in place, and without ``into``
    the whole state is returned as plain CPU tensors. DeepSpeed need not be installed. The other arguments are those of
    `shardckpt.load`. The files have no digests, so ``.info.verified`` is False.

    Raises `CheckpointNotFound`, `UnsupportedPickle`, `UnsupportedForeignCheckpoint`, `InvalidForeignCheckpoint`, `MissingFile`,
    `TruncatedFile`, and what `shardckpt.load` raises when the target does not fit.
    """
    options, store = options or Options(), open_store(path)
    selection = Selection(keys=keys, strict=strict, convert_dtype=convert_dtype)
    with Coordinator.connect(timeout=options.timeout) as coordinator:
        return SourceLoad(coordinator, store, "", selection, options, tag).run(into)


class SourceLoad(Load):
    """One load, on one rank."""

    _has_digests = False

    def __init__(
        self,
        coordinator: Coordinator,
        store: Store,
        prefix: str,
        selection: Selection,
        options: Options,
        tag: str | None,
    ) -> None:
        super().__init__(coordinator, store, prefix, selection, replace(options, read_once="never"))
        self._tag = tag

    def _open(self) -> None:
        def read() -> bytes:
            return msgspec.msgpack.encode(_index(read_contents(self._store, self._tag)))

        index = msgspec.msgpack.decode(self._coordinator.broadcast("load: directory", read), type=_Index)
        self._plan = SourcePlan(index.sources, index.aliases)
        self._checkpoint = Checkpoint(_manifest(index), self._plan, "")
        self._check_patterns(self._checkpoint)
        self._files = SourceFiles(self._store, self._checkpoint, index.sources, self._timings, self.filled)
        self._targets = Targets(self._checkpoint, self._files, self._coordinator.rank, self._selection)


def _index(contents: Contents) -> _Index:
    captured = capture(contents.tree, Whereabouts(0, 1))
    return _Index(
        sources=number_sources(contents.arrays),
        aliases={leaf.name: leaf.alias_of for leaf in captured.tensors if leaf.alias_of is not None},
        objects={name: encode_value(value, name) for name, value in captured.values.items()},
        containers={name: encode_value(value, name) for name, value in captured.containers.items()},
        step=contents.step,
        tag=contents.tag,
        world_size=contents.world_size,
    )


def _manifest(index: _Index) -> Manifest:
    """What a manifest would say of the directory, as far as a load asks."""
    tensors = {
        name: TensorRecord(alias=index.aliases[name]) if name in index.aliases else TensorRecord(dtype, shape)
        for name, (dtype, shape, _) in index.sources.tensors.items()
    }
    return Manifest(
        format=FORMAT,
        version=VERSION,
        attempt="",
        step=index.step,
        created="",
        world_size=index.world_size,
        block_size=BLOCK,
        meshes=(),
        layouts=(),
        tensors=tensors,
        objects=index.objects,
        containers=index.containers,
        files=(),
        torch=str(torch.__version__),
        shardckpt="",
        metadata={"deepspeed_tag": index.tag},
        checksum="",
    )
