# SPDX-License-Identifier: Apache-2.0
"""Errors as plain data, which other ranks and processes raise again."""

from __future__ import annotations

from typing import Any

import msgspec

from .errors import CheckpointError, RankFailed, error_from_wire


class Failure(msgspec.Struct, array_like=True):
    """An error as it travels."""

    kind: str
    message: str
    details: dict[str, Any]


def describe(error: BaseException) -> Failure:
    """An error in the form that travels; one from outside the tree of `errors` becomes a `RankFailed`."""
    if isinstance(error, CheckpointError):
        failure = Failure(type(error).__name__, error.message, error.details)
    else:
        name = type(error).__name__
        failure = Failure(RankFailed.__name__, f"{name}: {error}", {"error": name})
    if not _travels(failure):
        # Details that are no JSON values, or a file name that is no UTF-8. The others tell what may be removed.
        message = failure.message.encode(errors="backslashreplace").decode()
        failure = Failure(failure.kind, message, {key: value for key, value in failure.details.items() if _travels(value)})
    return failure


def _travels(value: object) -> bool:
    try:
        msgspec.msgpack.encode(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def note_common(error: Exception, told: CheckpointError) -> None:
    """Note in this rank's own ``error`` what all ranks were told of their round."""
    error.__dict__["told"] = told


def common(error: Exception) -> Exception:
    """The error that all ranks have in common that raised in one round: what they were told; ``error`` if that is what it is.

    Ranks that go on differently after different errors part ways; after this one they do not.
    """
    told: Exception = error.__dict__.get("told", error)
    return told


def rebuild(failure: Failure) -> CheckpointError:
    """The error that a failure describes."""
    return error_from_wire(failure.kind, failure.message, failure.details)
