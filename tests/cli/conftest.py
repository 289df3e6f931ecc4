# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

import shardckpt
from tests.cli.run import state


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with steps 1, 2 and 3 of one process; each differs from the others."""
    path = tmp_path / "run"
    with shardckpt.Checkpointer(path) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, state(step), metadata={"run": "test"}, wait=True)
    return path
