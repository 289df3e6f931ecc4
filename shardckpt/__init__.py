# SPDX-License-Identifier: Apache-2.0
"""Sharded checkpoints for PyTorch: saved in parallel from any layout, restored bit for bit on any other.

::

    with shardckpt.Checkpointer("/ckpts/run42", keep_last=3) as ckpt:
        state = {"model": model, "optimizer": optimizer, "rng": shardckpt.RNGState()}
        restored = ckpt.restore(state)
        for step in range(restored.step + 1 if restored else 0, total):
            train_step()
            if step % 100 == 0:
                ckpt.save(step, state)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import (
    AlreadyCommitted,
    AlreadyExists,
    BackgroundDied,
    CheckpointerClosed,
    CheckpointError,
    CheckpointNotFound,
    CheckpointRemoved,
    ChecksumMismatch,
    ConfigError,
    CoordinationError,
    DeviceMemoryError,
    DigestRefused,
    DtypeMismatch,
    DuplicateName,
    ExportRefused,
    HostMemoryError,
    IntegrityError,
    InvalidForeignCheckpoint,
    InvalidManifest,
    InvalidParity,
    MissingFile,
    MissingNames,
    NotACheckpointRoot,
    NotShared,
    RankFailed,
    RankTimeout,
    ReplicaDivergence,
    SaveDropped,
    SavePending,
    ShapeMismatch,
    StateChanged,
    StateError,
    StorageFull,
    StoreError,
    Superseded,
    TableMismatch,
    TargetMismatch,
    TruncatedFile,
    UnsupportedForeignCheckpoint,
    UnsupportedLeaf,
    UnsupportedPickle,
    UnsupportedVersion,
)
from .events import Event
from .options import Options, Retention
from .telemetry import PrometheusText, TensorBoardEvents

if TYPE_CHECKING:
    from .api import load, save
    from .checkpointer import Checkpointer
    from .engines import CheckpointEngine, get_checkpoint_engine, list_checkpoint_engines, register_checkpoint_engine
    from .handle import SaveHandle
    from .inference import InferenceConfig, default_inference_config, load_for_inference
    from .loading import Restored, RestoreInfo
    from .resuming import OptimizerCallable, Resumed, SchedulerCallable, resume
    from .sampler import ElasticSampler
    from .saving import Saved
    from .state import Flat, PerRank, RNGState

    cli_main: Callable[..., None]

# These modules need torch, which takes seconds to import. They are imported when a name of theirs is first used, so that
# commands that only look at files start at once. The command line does not need it, but stands above this module.
_HOMES = {
    "api": ("load", "save"),
    "checkpointer": ("Checkpointer",),
    "cli.app": ("cli_main",),
    "engines": ("CheckpointEngine", "get_checkpoint_engine", "list_checkpoint_engines", "register_checkpoint_engine"),
    "handle": ("SaveHandle",),
    "inference": ("InferenceConfig", "default_inference_config", "load_for_inference"),
    "loading": ("RestoreInfo", "Restored"),
    "resuming": ("OptimizerCallable", "Resumed", "SchedulerCallable", "resume"),
    "sampler": ("ElasticSampler",),
    "saving": ("Saved",),
    "state": ("Flat", "PerRank", "RNGState"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


if not TYPE_CHECKING:  # to a type checker, a name that is not listed above is an error

    def __getattr__(name: str) -> Any:
        home = _HOME_OF.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        member = globals()[name] = getattr(importlib.import_module(f".{home}", __name__), name)
        return member


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "AlreadyCommitted",
    "AlreadyExists",
    "BackgroundDied",
    "CheckpointEngine",
    "CheckpointError",
    "CheckpointNotFound",
    "CheckpointRemoved",
    "Checkpointer",
    "CheckpointerClosed",
    "ChecksumMismatch",
    "ConfigError",
    "CoordinationError",
    "DeviceMemoryError",
    "DigestRefused",
    "DtypeMismatch",
    "DuplicateName",
    "ElasticSampler",
    "Event",
    "ExportRefused",
    "Flat",
    "HostMemoryError",
    "InferenceConfig",
    "IntegrityError",
    "InvalidForeignCheckpoint",
    "InvalidManifest",
    "InvalidParity",
    "MissingFile",
    "MissingNames",
    "NotACheckpointRoot",
    "NotShared",
    "OptimizerCallable",
    "Options",
    "PerRank",
    "PrometheusText",
    "RNGState",
    "RankFailed",
    "RankTimeout",
    "ReplicaDivergence",
    "RestoreInfo",
    "Restored",
    "Resumed",
    "Retention",
    "SaveDropped",
    "SaveHandle",
    "SavePending",
    "Saved",
    "SchedulerCallable",
    "ShapeMismatch",
    "StateChanged",
    "StateError",
    "StorageFull",
    "StoreError",
    "Superseded",
    "TableMismatch",
    "TargetMismatch",
    "TensorBoardEvents",
    "TruncatedFile",
    "UnsupportedForeignCheckpoint",
    "UnsupportedLeaf",
    "UnsupportedPickle",
    "UnsupportedVersion",
    "__version__",
    "cli_main",
    "default_inference_config",
    "get_checkpoint_engine",
    "list_checkpoint_engines",
    "load",
    "load_for_inference",
    "register_checkpoint_engine",
    "resume",
    "save",
]
