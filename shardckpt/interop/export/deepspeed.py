# SPDX-License-Identifier: Apache-2.0
"""A directory that DeepSpeed 0.19 resumes from with ``engine.load_checkpoint``, at any ZeRO stage and world size.

DeepSpeed need not be installed. The engine has to have the configuration that the directory is made for: the stage, the world
size, the dtype, ``sub_group_size`` at stage 3, ``round_robin_gradients``, and ``parameter_alignment`` off.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from shardckpt.errors import ConfigError
from shardckpt.maintain.stored import Progress, StoredCheckpoint, no_progress
from shardckpt.store.base import name_problem
from shardckpt.store.outside import new_directory, new_file, require_free, require_local, require_only

from .content import ContentReader
from .engine_state import EngineState, read_engine_state
from .pickling import pickle_value
from .report import Counted
from .torchfile import write_torch_file
from .zero_files import Shape, zero_files

LATEST = "latest"
_WRITTEN = re.compile(r"\w*_(model|optim)_states\.pt", re.ASCII)
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile:
    """One file."""

    file: str
    """Its name."""
    bytes: int
    """Of its tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSpeedExport:
    """What was, or would be, written."""

    path: str
    """The directory that ``load_checkpoint`` takes."""
    tag: str
    """The directory in it, which ``latest`` names."""
    source: str
    """The checkpoint."""
    step: int
    """Number of the training step."""
    stage: int
    """ZeRO stage."""
    world_size: int
    """Number of ranks."""
    dtype: str
    """Name of the dtype of the parameters that are computed with."""
    bytes: int
    """Of tensors, in all files."""
    files: tuple[OutputFile, ...]
    """The files below the tag."""
    notes: tuple[str, ...]
    """What was taken for granted, because the checkpoint does not say it."""
    written: bool
    """Whether it was."""


def export_deepspeed(
    stored: StoredCheckpoint,
    path: str,
    *,
    stage: int,
    world_size: int,
    tag: str | None = None,
    dtype: str | None = None,
    order: Sequence[str] | None = None,
    key: str = "model",
    optimizer_key: str = "optimizer",
    sub_group_size: int = 10**9,
    round_robin: bool = False,
    replace: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> DeepSpeedExport:
    """Write ``path/<tag>`` and then ``path/latest``.

    ``order`` names all parameters, those of each param group in the group's order; checkpoints of DeepSpeed engines have it.
    ``dtype`` is the one of their engine unless given. Holds some 100 MB at most. Raises `AlreadyExists` unless ``replace``,
    `ExportRefused`, `ConfigError`, `IntegrityError` and `StoreError`; then there is no new tag, and ``latest`` is as it was.
    """
    if stage not in (1, 2, 3) or world_size < 1 or sub_group_size < 1:
        raise ConfigError(f"{stage=}, {world_size=}, {sub_group_size=}: stages are 1, 2 and 3, sizes are 1 at least")
    require_local(path)
    counted = Counted(progress)
    with ContentReader(stored, counted.add) as reader:
        state = read_engine_state(stored, reader, order=order, model_key=key, optimizer_key=optimizer_key)
        dtype = _dtype(dtype or state.counters.get("dtype"))
        shape = Shape(stage, world_size, dtype, sub_group_size, round_robin)
        tag = _tag(tag or stored.checkpoint.manifest.metadata.get("deepspeed_tag"), state)
        for name in (tag, LATEST):
            require_free(os.path.join(path, name), replace=replace)
        require_only(os.path.join(path, tag), _WRITTEN)
        files = tuple(
            OutputFile(file=name, bytes=counted.expect(pickle_value(value).contents))
            for name, value in zero_files(state, shape)
        )
        if not dry_run:
            _write(path, tag, state, shape, reader, replace=replace)
    return DeepSpeedExport(
        path=path,
        tag=tag,
        source=stored.url,
        step=stored.checkpoint.manifest.step,
        stage=stage,
        world_size=world_size,
        dtype=dtype,
        bytes=sum(file.bytes for file in files),
        files=files,
        notes=tuple(state.notes),
        written=not dry_run,
    )


def _write(path: str, tag: str, state: EngineState, shape: Shape, reader: ContentReader, *, replace: bool) -> None:
    with new_directory(os.path.join(path, tag), replace=replace) as directory:
        for name, value in zero_files(state, shape):
            with directory.file(name) as file:
                write_torch_file(file, pickle_value(value), reader)
    # last, so that it never names what is not there
    with new_file(os.path.join(path, LATEST), replace=replace) as file:
        file.write(tag.encode())


def _dtype(name: str | None) -> str:
    if name not in _DTYPES:
        known = "the checkpoint does not tell" if name is None else f"{name} is none of them"
        raise ConfigError(f"say in which dtype the engine computes (--dtype), {', '.join(_DTYPES)}: {known}")
    return name


def _tag(name: object, state: EngineState) -> str:
    tag = f"global_step{state.counters['global_steps']}" if name is None else str(name)
    problem = "it has a '/'" if "/" in tag else "it is not free for a tag" if tag == LATEST else name_problem(tag)
    if problem is not None:
        raise ConfigError(f"tag {tag!r} is refused: {problem}; choose another with --tag")
    return tag
