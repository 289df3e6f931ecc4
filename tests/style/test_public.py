# SPDX-License-Identifier: Apache-2.0
"""The public interface: which names there are, and that each says what it does."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import shardckpt
from shardckpt import _version, errors

NAMES = [
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


def _error_classes() -> dict[str, type[errors.CheckpointError]]:
    members = vars(errors).values()
    return {m.__name__: m for m in members if isinstance(m, type) and issubclass(m, errors.CheckpointError)}


def test_the_public_names_are_these() -> None:
    assert sorted(shardckpt.__all__) == NAMES


def test_every_error_is_public() -> None:
    assert _error_classes().keys() <= set(shardckpt.__all__)


@pytest.mark.parametrize("name", sorted(shardckpt.__all__))
def test_every_public_name_says_what_it_does(name: str) -> None:
    member = getattr(shardckpt, name)
    # Python 3.10 takes Callable[...] for a class
    if isinstance(member, types.GenericAlias) or not (isinstance(member, type) or inspect.isroutine(member)):
        return
    undocumented = [name] if not _own_docstring(member) else []
    if isinstance(member, type):
        undocumented += [
            f"{name}.{attribute}"
            for attribute, value in vars(member).items()
            if not attribute.startswith("_")
            and (inspect.isfunction(value) or isinstance(value, property | classmethod | staticmethod))
            and not inspect.getdoc(getattr(member, attribute))
        ]
    assert not undocumented


def _own_docstring(member: object) -> str | None:
    doc = member.__doc__
    # what dataclass writes when there is none
    if isinstance(member, type) and dataclasses.is_dataclass(member) and doc and doc.startswith(f"{member.__name__}("):
        return None
    return doc


def test_the_tree_of_errors_is_the_one_in_the_docstring() -> None:
    documented: dict[str, str] = {}
    path: list[tuple[int, str]] = [(-1, "")]
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"^ {4}(?P<lead>[ |`-]*)(?P<name>[A-Z]\w+) {2,}\S", line):
            while path[-1][0] >= len(found["lead"]):
                path.pop()
            documented[found["name"]] = path[-1][1]
            path.append((len(found["lead"]), found["name"]))
    actual = {name: kind.__bases__[0].__name__ for name, kind in _error_classes().items()}
    assert documented == {**actual, "CheckpointError": ""}


def test_the_version_is_said_once() -> None:
    assert shardckpt.__version__ == _version.__version__ == importlib.metadata.version("shardckpt")


def test_the_command_and_the_module_are_the_same_program() -> None:
    commands = [[str(Path(sys.executable).with_name("shardckpt"))], [sys.executable, "-m", "shardckpt"]]
    said = [
        subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, timeout=120).stdout
        for command in commands
    ]
    assert said[0] == said[1]
    for part in (shardckpt.__version__, "Apache-2.0", importlib.metadata.version("torch")):
        assert part in said[0]
