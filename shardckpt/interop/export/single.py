# SPDX-License-Identifier: Apache-2.0
"""A whole checkpoint, or a part of it, as one file for `torch.load`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardckpt.maintain.stored import Progress, StoredCheckpoint, no_progress
from shardckpt.store.outside import new_file, require_free, require_local

from .content import ContentReader
from .pickling import pickle_value
from .report import Counted
from .state import read_state
from .torchfile import write_torch_file


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchExport:
    """What was, or would be, written."""

    path: str
    """The file."""
    source: str
    """The checkpoint."""
    step: int
    """Number of the training step."""
    tensors: int
    """How many tensors, those that share their memory counted once."""
    bytes: int
    """Of tensors."""
    written: bool
    """Whether it was."""


def export_torch(
    stored: StoredCheckpoint,
    path: str,
    *,
    keys: Sequence[str] | None = None,
    replace: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> TorchExport:
    """Write the state, or what matches one of the shell patterns ``keys``, to one file for ``torch.load(weights_only=True)``.

    It is what `shardckpt.load` returns as ``state``. Holds some 100 MB at most. Raises `AlreadyExists` unless ``replace``,
    `MissingNames`, `ExportRefused`, `IntegrityError` and `StoreError`; then there is no file.
    """
    require_local(path)
    require_free(path, replace=replace)
    counted = Counted(progress)
    with ContentReader(stored, counted.add) as reader:
        pickled = pickle_value(read_state(stored, reader, keys))
        nbytes = counted.expect(pickled.contents)
        if not dry_run:
            with new_file(path, replace=replace) as file:
                write_torch_file(file, pickled, reader)
    return TorchExport(
        path=path,
        source=stored.url,
        step=stored.checkpoint.manifest.step,
        tensors=len(pickled.contents),
        bytes=nbytes,
        written=not dry_run,
    )
