# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that DeepSpeed wrote: imported, or loaded straight into a state. DeepSpeed itself is not needed."""

from __future__ import annotations

from .importing import Imported, import_deepspeed
from .loading import load

__all__ = ["Imported", "import_deepspeed", "load"]
