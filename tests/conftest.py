# SPDX-License-Identifier: Apache-2.0
"""Fixtures and profiles of the whole test suite, and the order of its tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.ranks import RankPool

# Before torch is loaded, and for all processes that tests start: several share each core, and would wait for their own threads.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
hypothesis.settings.register_profile("ci", deadline=None, derandomize=False, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

MINUTES = 600.0
"""A test that may take more seconds than these goes to whichever worker has least to do."""


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Rank processes with torch.distributed, made at first use and shared by all tests of this pytest process."""
    with RankPool() as pool:
        yield pool


def pytest_collection_finish() -> None:
    """All those tests stay to the end, and need not be looked at each time that garbage is collected."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have tests that may take long begin first: else one worker is left with them when the others have nothing to do.

    ``--dist worksteal`` deals out the list in equal parts, of which others take the end. So each part begins with slow tests:
    those that may take many minutes one by one, others by directories, since tests of one may share what took long to make.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    slow: dict[Path | str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow"):
            slow.setdefault(item.nodeid if _seconds(item) > MINUTES else item.path.parent, []).append(item)
    starts: list[list[pytest.Item]] = [[] for _ in range(workers)]
    for tests in sorted(slow.values(), key=_seconds_of_all, reverse=True):
        min(starts, key=_seconds_of_all).extend(sorted(tests, key=_seconds, reverse=True))
    others = [item for item in items if not item.get_closest_marker("slow")]
    ordered: list[pytest.Item] = []
    for number, start in enumerate(starts):
        size = (len(items) - len(ordered)) // (workers - number)
        ordered += start + others[: max(0, size - len(start))]
        del others[: max(0, size - len(start))]
    items[:] = ordered + others


def _seconds(item: pytest.Item) -> float:
    """How long a test may take."""
    limit = item.get_closest_marker("timeout")
    return float(limit.args[0] if limit else item.config.getini("timeout"))


def _seconds_of_all(tests: list[pytest.Item]) -> float:
    return sum(map(_seconds, tests))
