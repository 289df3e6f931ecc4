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

from ._version import __version__
from .api import load, save
from .checkpointer import Checkpointer, SaveHandle
from .errors import (
    AlreadyCommitted,
    AlreadyExists,
    CheckpointerClosed,
    CheckpointError,
    CheckpointNotFound,
    ChecksumMismatch,
    ConfigError,
    CoordinationError,
    DigestRefused,
    DtypeMismatch,
    DuplicateName,
    IntegrityError,
    InvalidManifest,
    MissingFile,
    MissingNames,
    NotACheckpointRoot,
    RankFailed,
    RankTimeout,
    ReplicaDivergence,
    ShapeMismatch,
    StateError,
    StorageFull,
    StoreError,
    TableMismatch,
    TargetMismatch,
    TruncatedFile,
    UnsupportedLeaf,
    UnsupportedVersion,
)
from .loading import Restored, RestoreInfo
from .options import Options, Retention
from .sampler import ElasticSampler
from .saving import Saved
from .state import Flat, PerRank, RNGState

__all__ = [
    "AlreadyCommitted",
    "AlreadyExists",
    "CheckpointError",
    "CheckpointNotFound",
    "Checkpointer",
    "CheckpointerClosed",
    "ChecksumMismatch",
    "ConfigError",
    "CoordinationError",
    "DigestRefused",
    "DtypeMismatch",
    "DuplicateName",
    "ElasticSampler",
    "Flat",
    "IntegrityError",
    "InvalidManifest",
    "MissingFile",
    "MissingNames",
    "NotACheckpointRoot",
    "Options",
    "PerRank",
    "RNGState",
    "RankFailed",
    "RankTimeout",
    "ReplicaDivergence",
    "RestoreInfo",
    "Restored",
    "Retention",
    "SaveHandle",
    "Saved",
    "ShapeMismatch",
    "StateError",
    "StorageFull",
    "StoreError",
    "TableMismatch",
    "TargetMismatch",
    "TruncatedFile",
    "UnsupportedLeaf",
    "UnsupportedVersion",
    "__version__",
    "load",
    "save",
]
