# SPDX-License-Identifier: Apache-2.0
"""Checkpoint engines by name: what one implements, how others are added, and those that are here.

===========  ========================================================================================
``sync``     ``commit`` returns when the step is durable
``async``    it returns when the state may be changed; a thread writes and commits
``lazy``     the same, and what optimizers own is copied while the next forward and backward pass run
``process``  as ``async``, but another process writes and commits, even if this one dies meanwhile
===========  ========================================================================================

They are registered here, through the call that is there for everybody, and so are known also where nothing is installed.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from .base import CheckpointEngine
from .registry import EngineFactory, get_checkpoint_engine, list_checkpoint_engines, register_checkpoint_engine


def _make_builtin(name: str, root: str | os.PathLike[str], **arguments: Any) -> CheckpointEngine:
    # it needs torch, which takes seconds to import, and names are to be listed at once
    from .builtin import make_engine

    return make_engine(name, root, **arguments)


for _name in ("sync", "async", "lazy", "process"):
    register_checkpoint_engine(_name, partial(_make_builtin, _name))

__all__ = [
    "CheckpointEngine",
    "EngineFactory",
    "get_checkpoint_engine",
    "list_checkpoint_engines",
    "register_checkpoint_engine",
]
