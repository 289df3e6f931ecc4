# SPDX-License-Identifier: Apache-2.0
"""What one check says of one thing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import CheckpointError

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a diagnosis."""

    check: str
    """What was looked at, such as ``gpu 0 link``."""
    status: Status
    """``warning``: saves are slower, or less safe, than they could be; ``problem``: do not train here like this."""
    text: str
    """What was found."""
    remedy: str = ""
    """What to do about it, unless all is well."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The numbers in the text: bytes, seconds, bytes per second."""


def refusal(check: str, error: CheckpointError) -> Finding:
    """A problem, as an error tells of it: what comes last in its message, after a semicolon or a full stop, is what to do."""
    text, _, remedy = error.message.rpartition("; " if "; " in error.message else ". ")
    values = {"error": type(error).__name__}
    if not text:
        return Finding(check, "problem", remedy, "put right what it says, and look again", values)
    return Finding(check, "problem", text, remedy, values)


def gigabytes(nbytes: float) -> str:
    """Bytes, or bytes per second, as a number of GB."""
    return f"{nbytes / 1e9:.3g} GB"


def amount(nbytes: int) -> str:
    """Bytes in the largest decimal unit that they fill."""
    size, units = float(nbytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}"


def milliseconds(seconds: float) -> str:
    """Seconds as a number of milliseconds."""
    return f"{seconds * 1e3:.3g} ms"
