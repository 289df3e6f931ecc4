# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of upkeep."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.maintain.make import LAYOUTS, save_spread
from tests.ranks import RankPool


@pytest.fixture(scope="session")
def everywhere(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of one state by layout, saved by as many ranks as the layout has; not to be changed."""
    root = tmp_path_factory.mktemp("everywhere")
    for world_size, layout in LAYOUTS:
        ranks.run(world_size, save_spread, str(root / layout), layout)
    return {layout: root / layout for _, layout in LAYOUTS}
