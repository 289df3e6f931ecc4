# SPDX-License-Identifier: Apache-2.0
"""A checkpoint engine of a third party, with a format of its own: one safetensors and one JSON file per step, of rank 0.

It uses nothing of shardckpt but public names, and is for states that are equal on all ranks.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import torch as safetensors

import shardckpt

Result = TypeVar("Result")


class PlainFiles(shardckpt.CheckpointEngine):
    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = Path(root)
        self._draft: tuple[int, dict[str, Any], dict[str, Any]] | None = None
        self._closed = False

    def create(self, step: int, metadata: Mapping[str, Any] | None = None) -> None:
        self._require_open()
        if type(step) is not int or step < 0:
            raise shardckpt.ConfigError(f"step={step!r}")
        if not isinstance(metadata, Mapping | None):
            raise shardckpt.ConfigError(f"metadata={metadata!r}")
        self._draft = (step, dict(metadata or {}), {})

    def save(self, state: Mapping[str, Any]) -> None:
        _, _, parts = self._require_draft()
        if not isinstance(state, Mapping):
            raise shardckpt.StateError(f"{state!r} is no state")
        for key, value in state.items():
            if key in parts:
                raise shardckpt.DuplicateName(f"{key!r} was saved before")
            parts[key] = value

    def commit(self) -> None:
        step, metadata, parts = self._require_draft()
        if not parts:
            raise shardckpt.ConfigError("nothing was saved")
        self._draft = None
        tensors: dict[str, torch.Tensor] = {}
        tree = _together(lambda: _encode(parts, tensors))
        _together(lambda: self._write(step, {"tree": tree, "metadata": metadata, "world_size": _world_size()}, tensors))

    def wait(self) -> None:
        return  # commit has

    def steps(self) -> list[int]:
        return sorted(int(path.name) for path in self._root.glob("[0-9]*")) if self._root.exists() else []

    def load(
        self,
        state: Mapping[str, Any],
        *,
        step: int | None = None,
        keys: Sequence[str] | None = None,
        strict: bool = True,
        convert_dtype: bool = False,
        expect_digest: str | None = None,
        fallback: bool = False,
    ) -> shardckpt.Restored | None:
        self._require_open()
        if keys is not None or not strict or convert_dtype or expect_digest is not None or fallback:
            raise shardckpt.ConfigError("plain-files loads all or nothing")
        begun, steps = time.perf_counter(), self.steps()
        if step is None and not steps:
            return None
        if step is not None and step not in steps:
            raise shardckpt.CheckpointNotFound(f"step {step} is not among {steps}")
        step = steps[-1] if step is None else step
        record, data = _together(lambda: self._read(step))
        restored = _put_back(state, _decode(record["tree"], safetensors.load(data)))
        info = shardckpt.RestoreInfo(
            world_size=record["world_size"],
            bytes_needed=len(data) * _world_size(),
            bytes_read=len(data) * _world_size(),
            seconds=time.perf_counter() - begun,
            read_once=False,
            verified=True,
            missing=(),
            unexpected=(),
            kept=(),
            metadata=record["metadata"],
        )
        return shardckpt.Restored(step, restored, info, record["sha256"])

    def cleanup(self) -> None:
        self._draft, self._closed = None, True

    def _write(self, step: int, record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        if step in self.steps():
            raise shardckpt.AlreadyCommitted(f"step {step} is there")
        if dist.is_initialized():
            dist.barrier()  # so that nobody looks after rank 0 has written
        if dist.is_initialized() and dist.get_rank() != 0:
            return
        data = safetensors.save(tensors)
        draft = self._root / f".draft-{step}"
        draft.mkdir(parents=True, exist_ok=True)
        for name, content in (
            ("tensors", data),
            ("record", json.dumps(record | {"sha256": hashlib.sha256(data).hexdigest()}).encode()),
        ):
            with open(draft / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        draft.rename(self._root / str(step))
        directory = os.open(self._root, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)

    def _read(self, step: int) -> tuple[dict[str, Any], bytes]:
        record = json.loads((self._root / str(step) / "record").read_bytes())
        data = (self._root / str(step) / "tensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != record["sha256"]:
            raise shardckpt.IntegrityError(f"step {step} is damaged")
        return record, data

    def _require_open(self) -> None:
        if self._closed:
            raise shardckpt.CheckpointerClosed("the engine was cleaned up")

    def _require_draft(self) -> tuple[int, dict[str, Any], dict[str, Any]]:
        self._require_open()
        if self._draft is None:
            raise shardckpt.ConfigError("create was not called")
        return self._draft


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _together(call: Callable[[], Result]) -> Result:
    """What ``call`` returns, or on all ranks the first error that it raised on any."""
    result: Any = None
    error: shardckpt.CheckpointError | None = None
    try:
        result = call()
    except shardckpt.CheckpointError as raised:
        error = raised
    errors = [error]
    if dist.is_initialized():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    for raised_somewhere in errors:
        if raised_somewhere is not None:
            raise raised_somewhere
    return result


def _encode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Anything as JSON, with tensors by number."""
    if hasattr(value, "state_dict"):
        value = value.state_dict()
    if isinstance(value, torch.Tensor):
        tensors[str(len(tensors))] = value.detach().clone(memory_format=torch.contiguous_format)
        return {"tensor": str(len(tensors) - 1)}
    if isinstance(value, Mapping):
        return {"mapping": [[key, _encode(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_encode(item, tensors) for item in value]}
    if isinstance(value, int | float | str | None):
        return {"value": value}
    raise shardckpt.UnsupportedLeaf(f"a {type(value).__name__} is not stored")


def _decode(record: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    ((kind, content),) = record.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "mapping":
        return {key: _decode(item, tensors) for key, item in content}
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](_decode(item, tensors) for item in content)
    return content


def _put_back(target: Any, loaded: Any) -> Any:
    """Fill ``target``, and return what then stands in its place."""
    if hasattr(target, "load_state_dict"):
        target.load_state_dict(copy.deepcopy(loaded))
        return target
    if isinstance(target, torch.Tensor):
        target.copy_(loaded)
        return target
    if isinstance(target, dict):
        if target.keys() != loaded.keys():
            raise shardckpt.MissingNames(f"{sorted(target)} is wanted, and {sorted(loaded)} there")
        target.update({key: _put_back(item, loaded[key]) for key, item in target.items()})
        return target
    return loaded
