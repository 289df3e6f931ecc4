# SPDX-License-Identifier: Apache-2.0
"""What one check says of one thing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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


def gigabytes(nbytes: float) -> str:
    """Bytes, or bytes per second, as a number of GB."""
    return f"{nbytes / 1e9:.3g} GB"
