# SPDX-License-Identifier: Apache-2.0
"""`attach`: an engine of DeepSpeed saves and loads through shardckpt from then on."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import msgspec
import torch.distributed as dist

from ...adapters.owners import Received
from ...checkpointer import Checkpointer
from ...commit import read_manifest_bytes
from ...errors import CheckpointNotFound, ConfigError, DtypeMismatch
from ...events import Event
from ...handle import SaveHandle
from ...interop.deepspeed import load
from ...loading import Restored
from ...manifest import step_directory
from ...options import Options
from ...root import Root
from ...store import Store, open_store
from ...validate import parse_manifest
from .counters import counters_of, set_counters
from .masters import masters_of
from .refusals import require_between_steps, require_supported

logger = logging.getLogger("shardckpt")

TAG = "deepspeed_tag"
"""Key of the tag in the metadata of a checkpoint."""
_WITHOUT_FROZEN = "deepspeed_without_frozen_parameters"
_NOT_LATEST = "deepspeed_not_latest"
_MOST_OPEN = 2
"""Directories that are kept open when each call names its own."""


class _Choice(msgspec.Struct):
    """Which checkpoint rank 0 has found."""

    step: int | None
    metadata: dict[str, Any]
    foreign: bool = False
    """Whether DeepSpeed itself wrote it."""


def attach(
    engine: Any,
    root: str | os.PathLike[str] | None = None,
    *,
    keep_last: int | None = None,
    keep_every: int | None = None,
    options: Options | None = None,
    on_event: Callable[[Event], object] | None = None,
    wait: bool = False,
) -> Attachment:
    """Make ``engine.save_checkpoint`` and ``engine.load_checkpoint`` go through shardckpt; collective, after
    ``deepspeed.initialize``. Their arguments and results stay as they are.

    ``root``: a path or URL for all checkpoints, whatever directory the calls name; None takes the directory of each call.
    With ``wait``, a save returns when it is durable, else when the engine may train on. The rest is as for `Checkpointer`.

    ZeRO stages 0 to 3, in bf16, fp16 and fp32, with offload to CPU memory and quantized communication, are saved under
    the names and shapes of plain training, so that a checkpoint of any stage and number of ranks loads at any other, and in
    plain PyTorch. Raises `ConfigError` for what is not supported: pipeline and tensor parallelism, expert parameters,
    offload to NVMe or of a part of the optimizer, MiCS, hpZ, quantized frozen weights, ZenFlow, SuperOffload.
    """
    require_supported(engine)
    if "save_checkpoint" in vars(engine):
        raise ConfigError("this engine's save_checkpoint is replaced already: detach() that first")

    def make(place: str | os.PathLike[str]) -> Checkpointer:
        return Checkpointer(place, keep_last=keep_last, keep_every=keep_every, options=options, on_event=on_event)

    return Attachment(engine, root, make, wait=wait)


class Attachment:
    """Saves and loads one engine. Usable as a context manager that closes it."""

    def __init__(
        self,
        engine: Any,
        root: str | os.PathLike[str] | None,
        make: Callable[[str | os.PathLike[str]], Checkpointer],
        *,
        wait: bool,
    ) -> None:
        self._engine = engine
        self._make = make
        self._wait = wait
        self._root = None if root is None else os.fspath(root)
        self._open: dict[str, Checkpointer] = {}
        """By root, the one used last at the end."""
        self._ignored: set[str] = set()
        self.last: SaveHandle | None = None
        """The last save that was asked for."""
        if self._root is not None:
            self._open[self._root] = make(self._root)
        engine.save_checkpoint = self.save_checkpoint
        engine.load_checkpoint = self.load_checkpoint

    @property
    def checkpointer(self) -> Checkpointer:
        """The one of ``root``, or of the directory that was used last. Raises `ConfigError` when there is none yet."""
        if not self._open:
            raise ConfigError("there is no Checkpointer yet: no directory was given to attach, and none was saved to or loaded")
        return next(reversed(self._open.values()))

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """As ``DeepSpeedEngine.save_checkpoint``. The step is ``engine.global_steps``; ``tag`` goes into the metadata.

        ``client_state`` is that of rank 0. Without ``save_latest`` a load has to name the tag. Raises `AlreadyCommitted` when
        the step is saved already, and `StateError` within a gradient accumulation.
        """
        engine = self._engine
        require_between_steps(engine, "save_checkpoint")
        checkpointer = self._checkpointer(save_dir)
        masters = masters_of(engine)
        is_first = dist.get_rank() == 0
        state: dict[str, Any] = {
            "model": masters.model(frozen=not exclude_frozen_parameters),
            "deepspeed": counters_of(engine) if is_first else {},
            "client_state": dict(client_state or {}) if is_first else {},
        }
        optimizer = masters.partitioned_optimizer()
        if optimizer is not None:
            state["optimizer"] = optimizer
        if engine.lr_scheduler is not None:
            state["lr_scheduler"] = engine.lr_scheduler
        metadata: dict[str, Any] = {TAG: f"global_step{engine.global_steps}" if tag is None else str(tag)}
        if exclude_frozen_parameters:
            metadata[_WITHOUT_FROZEN] = True
        if not save_latest:
            metadata[_NOT_LATEST] = True
        self.last = checkpointer.save(engine.global_steps, state, metadata=metadata, wait=self._wait)
        return True

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """As ``DeepSpeedEngine.load_checkpoint``: where the checkpoint is, and its client_state; (None, None) without one.

        Any number of ranks, any ZeRO stage. Without ``tag`` the newest one is loaded. Where shardckpt has saved none, what
        DeepSpeed itself has saved in ``load_dir`` is loaded, as `shardckpt.interop.deepspeed.load` does. Raises
        `CheckpointNotFound` for a tag that is not there, `IntegrityError` for damage, `TargetMismatch` when names, shapes or
        param groups do not fit.
        """
        if custom_load_fn is not None:
            raise ConfigError("custom_load_fn gets DeepSpeed's own files, which shardckpt does not write; leave it out")
        engine = self._engine
        require_between_steps(engine, "load_checkpoint")
        checkpointer = self._checkpointer(load_dir)
        choice = self._choose(checkpointer, load_dir, tag)
        if choice.step is None and not choice.foreign:
            logger.warning("there is no checkpoint in %s to load", checkpointer.url)
            return None, None
        masters = masters_of(engine)
        may_miss = masters.frozen.__contains__ if choice.metadata.get(_WITHOUT_FROZEN) else lambda name: False
        state: dict[str, Any] = {"model": masters.model(strict=load_module_strict, may_miss=may_miss)}
        optimizer = masters.partitioned_optimizer()
        with_optimizer = load_optimizer_states and not load_module_only
        if optimizer is not None and with_optimizer:
            state["optimizer"] = optimizer
        received = {key: Received() for key in ("deepspeed", "client_state", "lr_scheduler")}
        state.update(received)
        if choice.foreign:
            restored = _convert_if_needed(partial(load, load_dir, state, tag=tag, options=checkpointer._options), load_dir)
            place = f"{os.fspath(load_dir)}/{restored.info.metadata[TAG]}"
        else:
            restored = _convert_if_needed(partial(checkpointer.restore, state, step=choice.step), checkpointer.url)
            place = f"{checkpointer.url}/{step_directory(restored.step)}"
        masters.make_parameters()
        if not load_module_only:
            set_counters(engine, received["deepspeed"].value, restored.step, optimizer=with_optimizer)
            if load_lr_scheduler_states:
                _set_scheduler(engine.lr_scheduler, received["lr_scheduler"].value)
            engine.loaded_checkpoint_mp_world_size = engine.mp_world_size
        engine.loaded_checkpoint_dp_world_size = restored.info.world_size
        return place, received["client_state"].value or {}

    def detach(self) -> None:
        """`close`, and give the engine its own methods back."""
        for name in ("save_checkpoint", "load_checkpoint"):
            vars(self._engine).pop(name, None)
        self.close()

    def close(self) -> None:
        """Wait for the save that is under way, and let go of the other ranks. Collective; a second call does nothing."""
        while self._open:
            self._open.pop(next(iter(self._open))).close()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _checkpointer(self, directory: str | os.PathLike[str]) -> Checkpointer:
        place = os.fspath(directory) if self._root is None else self._root
        if place != os.fspath(directory) and os.fspath(directory) not in self._ignored:
            self._ignored.add(os.fspath(directory))
            logger.info("%s is not used: all checkpoints of this engine are in %s", directory, place)
        found = self._open.pop(place, None)
        if found is None:
            while len(self._open) >= _MOST_OPEN:
                self._open.pop(next(iter(self._open))).close()
            found = self._make(place)
        self._open[place] = found
        return found

    def _choose(self, checkpointer: Checkpointer, load_dir: str | os.PathLike[str], tag: str | None) -> _Choice:
        """The newest checkpoint with that tag, or that may be loaded without naming one; the same on all ranks."""
        checkpointer.wait()

        def find() -> bytes:
            return msgspec.msgpack.encode(_find(checkpointer._store, open_store(load_dir), tag))

        packed = checkpointer._coordinator.broadcast("load_checkpoint: which", find)
        return msgspec.msgpack.decode(packed, type=_Choice)


def _find(store: Store, given: Store, tag: str | None) -> _Choice:
    """What of the root ``store`` to load, or whether to load what DeepSpeed has left in the directory that was given."""
    tags = []
    for step in reversed(Root(store).steps()):
        metadata = parse_manifest(read_manifest_bytes(store, f"{step_directory(step)}/")).manifest.metadata
        if metadata.get(TAG) == tag if tag is not None else not metadata.get(_NOT_LATEST):
            return _Choice(step, metadata)
        tags.append(str(metadata.get(TAG)))
    names = [entry.name for entry in given.list() if entry.name.endswith("_states.pt")]
    if any(not tags or name.startswith(f"{tag}/") for name in names):
        return _Choice(None, {}, foreign=True)
    if tag is not None and tags:
        raise CheckpointNotFound(
            f"no checkpoint in {store.url} has the tag {tag!r}; there are {', '.join(tags[:8])}", tag=tag, tags=tags
        )
    return _Choice(None, {})


def _convert_if_needed(load: Callable[..., Restored | None], place: str | os.PathLike[str]) -> Restored:
    """Load; masters of another dtype than the stored ones are converted, and it is said so."""
    try:
        restored = load()
    except DtypeMismatch as error:
        # nothing is filled by then
        logger.warning("%s is loaded with conversions: %s", place, error)
        restored = load(convert_dtype=True)
    assert restored is not None
    return restored


def _set_scheduler(scheduler: Any, stored: Any) -> None:
    if scheduler is None:
        return
    if stored is None:
        logger.warning("the checkpoint has no lr_scheduler, so that of the engine stays as it is")
        return
    scheduler.load_state_dict(stored)
