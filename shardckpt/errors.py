# SPDX-License-Identifier: Apache-2.0
"""Every error that shardckpt raises on purpose, in one tree.

::

    CheckpointError                 base of all; catch this one to catch everything
    |-- ConfigError                 an option or argument is refused (also a ValueError)
    |-- CheckpointerClosed          save or restore after close
    |-- StateError                  the state that was handed over cannot be saved or restored
    |   |-- UnsupportedLeaf         a value of a type that is not stored; names its path in the tree
    |   |-- DuplicateName           two leaves have the same name
    |   |-- TableMismatch           ranks describe one tensor in ways that do not fit together
    |   |-- ReplicaDivergence       a replicated tensor or value differs between ranks
    |   `-- StateChanged            a tensor was changed while the save still needed it
    |-- TargetMismatch              the checkpoint and the target of a load do not fit
    |   |-- MissingNames            strict load: names absent in the checkpoint, or unexpected in it
    |   |-- ShapeMismatch           same name, other shape
    |   `-- DtypeMismatch           same name, other dtype, and no conversion was asked for
    |-- IntegrityError              what is stored is not what was saved
    |   |-- InvalidManifest         the manifest breaks the format
    |   |   `-- UnsupportedVersion  the manifest is from a newer version, or needs an unknown feature
    |   |-- InvalidForeignCheckpoint  files of another program's checkpoint are damaged, or do not fit together
    |   |-- InvalidParity           the record of a checkpoint's parity files breaks the format, or is of another checkpoint
    |   |-- ChecksumMismatch        data does not match its digest
    |   |-- TruncatedFile           a file is shorter than what the manifest says
    |   |-- MissingFile             a file that the manifest names is not there
    |   `-- DigestRefused           the manifest is not the one that ``expect_digest`` asked for
    |-- UnsupportedForeignCheckpoint  a checkpoint of another program that is not read (experts, pipelines, old files)
    |   `-- UnsupportedPickle       a pickle names a class that is not listed, or breaks the limits
    |-- ExportRefused               the checkpoint does not hold what an export needs, or holds what its format cannot
    |-- CheckpointNotFound          nothing committed at this place
    |   `-- CheckpointRemoved       what was committed there was removed while it was read
    |-- AlreadyCommitted            this step is already committed by another save
    |-- Superseded                  a newer start of the run has begun: this process was left behind, and cannot save any more
    |-- SavePending                 a save is not durable within the time that ``result`` was given (also a TimeoutError)
    |-- SaveDropped                 a save was skipped, or replaced by a newer one, as ``when_busy`` says
    |-- BackgroundDied              the process that finishes saves in the background is gone
    |-- HostMemoryError             there is no host memory to stage a state in
    |-- DeviceMemoryError           a GPU has had uncorrected memory errors, so the state may be damaged
    |-- StoreError                  the storage refused or failed an operation
    |   |-- AlreadyExists           a name that must be new is taken
    |   |-- NotACheckpointRoot      the place holds something else (a file, foreign data)
    |   |-- NotShared               hosts have directories of their own where they should have one together
    |   `-- StorageFull             no space or quota left
    `-- CoordinationError           the ranks could not finish an operation together
        |-- RankTimeout             some ranks did not arrive before the deadline; ``ranks`` names them
        `-- RankFailed              another rank failed with an error from outside this tree

Each takes one message and keyword details that are JSON values, so that the same error can be raised on every rank.
"""

from __future__ import annotations

from typing import Any


class CheckpointError(Exception):
    """Base of all errors of shardckpt.

    ``details`` holds the machine-readable part of the message (names, ranks, byte ranges); each detail can be read as an
    attribute, for example ``error.ranks``.
    """

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def add(self, sentence: str, **details: Any) -> None:
        """Say more: a sentence at the end of the message, and details."""
        self.message = f"{self.message}. {sentence}"
        self.args = (self.message,)
        self.details.update(details)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["details"][name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no detail {name!r}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.details))


class ConfigError(CheckpointError, ValueError):
    """An option or argument is refused; the message says which values are accepted."""


class CheckpointerClosed(CheckpointError):
    """A save or restore was asked for after ``close``."""


class StateError(CheckpointError):
    """The state that was handed over cannot be saved or restored."""


class UnsupportedLeaf(StateError):
    """A value of a type that is not stored. Nothing is pickled, so it has to be expressed in supported types."""


class DuplicateName(StateError):
    """Two leaves of the state have the same name."""


class TableMismatch(StateError):
    """Ranks describe one tensor in ways that do not fit together (shapes, dtypes, layouts)."""


class ReplicaDivergence(StateError):
    """A tensor or value that is replicated differs between ranks; names the key and the ranks."""


class StateChanged(StateError):
    """A tensor was changed in place while a save still needed its value; names the tensors."""


class TargetMismatch(CheckpointError):
    """The checkpoint and the target of a load do not fit."""


class MissingNames(TargetMismatch):
    """A strict load found names that are missing in the checkpoint, or unexpected in it."""


class ShapeMismatch(TargetMismatch):
    """A tensor of the target has another shape than the stored one."""


class DtypeMismatch(TargetMismatch):
    """A tensor of the target has another dtype than the stored one, and no conversion was asked for."""


class IntegrityError(CheckpointError):
    """What is stored is not what was saved."""


class InvalidManifest(IntegrityError):
    """The manifest breaks the format; the message names the field."""


class UnsupportedVersion(InvalidManifest):
    """The manifest is from a newer version of shardckpt, or needs a feature that this one does not know."""


class InvalidForeignCheckpoint(IntegrityError):
    """Files of another program's checkpoint are damaged, or do not fit together."""


class InvalidParity(IntegrityError):
    """The record of a checkpoint's parity files breaks the format or belongs to another checkpoint; the data may be intact."""


class ChecksumMismatch(IntegrityError):
    """Stored data does not match its digest; names tensor, file and byte range."""


class TruncatedFile(IntegrityError):
    """A file is shorter than the manifest says; names file, wanted and got bytes."""


class MissingFile(IntegrityError):
    """A file that should be there is not."""


class DigestRefused(IntegrityError):
    """The manifest's SHA-256 is not the one that was expected."""


class UnsupportedForeignCheckpoint(CheckpointError):
    """A checkpoint of another program holds what is not read; the message says what, and what to do."""


class UnsupportedPickle(UnsupportedForeignCheckpoint):
    """A pickle names a class that is not listed (detail ``refused``), or breaks a limit; nothing of it was called."""


class ExportRefused(CheckpointError):
    """The checkpoint does not hold what an export needs, or holds what its format cannot; nothing was written."""


class CheckpointNotFound(CheckpointError):
    """There is no committed checkpoint at this place."""


class CheckpointRemoved(CheckpointNotFound):
    """The checkpoint was removed, most likely by a prune, while it was read; it is not damaged."""


class AlreadyCommitted(CheckpointError):
    """The step is already committed by another save; nothing was changed."""


class Superseded(CheckpointError):
    """A newer start of the run has begun: this process was left behind, and cannot save any more."""


class SavePending(CheckpointError, TimeoutError):
    """A save is not durable, or not staged, within the time that was given; it goes on."""


class SaveDropped(CheckpointError):
    """A save was not made because of another one: ``when_busy`` said to skip it, or to replace it by a newer one."""


class BackgroundDied(CheckpointError):
    """The process that finishes saves in the background ended before the save was durable."""


class HostMemoryError(CheckpointError):
    """There is not even a chunk of host memory to stage a state in."""


class DeviceMemoryError(CheckpointError):
    """A GPU has had memory errors that ECC could not correct, and the state may be damaged: it is not saved.

    ``rank`` and ``gpus`` (uuid, index, name, count, how many of them are new) say where.
    """


class StoreError(CheckpointError):
    """The storage refused or failed an operation; the cause is chained."""


class AlreadyExists(StoreError):
    """A name that must be new is taken."""


class NotACheckpointRoot(StoreError):
    """The place holds something that is not a checkpoint root."""


class NotShared(StoreError):
    """Ranks do not see one directory; ``ranks`` are those whose files rank 0 does not see, or who do not see its own."""


class StorageFull(StoreError):
    """The storage has no space or quota left."""


class CoordinationError(CheckpointError):
    """The ranks could not finish an operation together."""


class RankTimeout(CoordinationError):
    """Some ranks did not arrive before the deadline; ``ranks`` names them."""


class RankFailed(CoordinationError):
    """Another rank failed with an error that is not one of shardckpt's own."""


def told(value: object) -> str:
    """A value in the text of an error: what Python writes, unless that is long or has several lines."""
    text = repr(value)
    return text if len(text) <= 80 and text.isprintable() else f"{type(value).__name__}(...)"


def _rebuild(kind: type[CheckpointError], message: str, details: dict[str, Any]) -> CheckpointError:
    return kind(message, **details)


def _tree(kind: type[CheckpointError]) -> dict[str, type[CheckpointError]]:
    found = {kind.__name__: kind}
    for child in kind.__subclasses__():
        found.update(_tree(child))
    return found


def error_from_wire(kind: str, message: str, details: dict[str, Any]) -> CheckpointError:
    """Rebuild an error that another rank raised; an unknown ``kind`` becomes `RankFailed`."""
    return _tree(CheckpointError).get(kind, RankFailed)(message, **details)
