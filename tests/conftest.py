# SPDX-License-Identifier: Apache-2.0
"""Fixtures and profiles of the whole test suite, and the order of its tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import hypothesis
import pytest

from tests.ranks import RankPool

hypothesis.settings.register_profile("ci", deadline=None, derandomize=False, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Rank processes with torch.distributed, made at first use and shared by all tests of this pytest process."""
    with RankPool() as pool:
        yield pool


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have tests that may take long begin first: else one worker is left with them when the others have nothing to do."""
    items.sort(key=_may_take, reverse=True)


def pytest_collection_finish() -> None:
    """All those tests stay to the end, and need not be looked at each time that garbage is collected."""
    gc.collect()
    gc.freeze()


def _may_take(item: pytest.Item) -> float:
    """Seconds that a slow test is given; those that are not slow are all alike, and stay in the order of their files."""
    if item.get_closest_marker("slow") is None:
        return 0.0
    limit = item.get_closest_marker("timeout")
    return float(limit.args[0] if limit else item.config.getini("timeout"))
