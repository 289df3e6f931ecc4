# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of four ranks with parity, made once and copied for each test that damages one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parity.jobs import save
from tests.ranks import RankPool
from tests.store.conftest import s3_endpoint

__all__ = ["s3_endpoint"]

GROUP_SIZES = (2, 3, 4)


@pytest.fixture(scope="session")
def originals(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By group size; not to be changed."""
    root = tmp_path_factory.mktemp("parity")
    for size in GROUP_SIZES:
        ranks.run(4, save, str(root / str(size)), f"xor:{size}")
    return {size: root / str(size) for size in GROUP_SIZES}


@pytest.fixture
def copy(originals: dict[int, Path], tmp_path: Path) -> Callable[[int], Path]:
    """A checkpoint with groups of so many ranks, to be damaged."""

    def make(size: int) -> Path:
        return Path(shutil.copytree(originals[size], tmp_path / f"copy-{size}"))

    return make
