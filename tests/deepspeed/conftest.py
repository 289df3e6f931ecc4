# SPDX-License-Identifier: Apache-2.0
"""Rank processes of their own: what DeepSpeed keeps for a whole process shall not meet the rest of the suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """In place of those that the rest of the suite shares."""
    with RankPool() as pool:
        yield pool
