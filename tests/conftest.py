# SPDX-License-Identifier: Apache-2.0
"""Fixtures and profiles of the whole test suite."""

from __future__ import annotations

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
