# SPDX-License-Identifier: Apache-2.0
"""Every checkpoint engine keeps the contract: those that are here, and one that pip has installed from another project."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.entry.conformance import CASES, load_one, run_cases, save_one
from tests.entry.installed import install_sample
from tests.ranks import RankPool

ENGINES = ["async", "lazy", "plain-files", "process", "sync"]


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The site directory of the engine that comes from a third party."""
    return {"plain-files": install_sample(tmp_path_factory.mktemp("sample"))}


@pytest.mark.parametrize("name", ["async", "sync"])
def test_in_one_process(name: str, tmp_path: Path) -> None:
    run_cases(name, None, str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lazy", "plain-files", "process"])
def test_others_in_one_process(sites: dict[str, str], name: str, tmp_path: Path) -> None:
    run_cases(name, sites.get(name), str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_on_two_ranks(ranks: RankPool, sites: dict[str, str], name: str, tmp_path: Path) -> None:
    # one rank would flip a bit, and the other one flip it back
    cases = tuple(case.__name__ for case in CASES if case.__name__ != "refuses_a_damaged_step")
    ranks.run(2, run_cases, name, sites.get(name), str(tmp_path), cases, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_from_two_ranks_to_three_and_one(ranks: RankPool, sites: dict[str, str], name: str, tmp_path: Path) -> None:
    expected = ranks.run(2, save_one, name, sites.get(name), str(tmp_path), timeout=200)[0]
    assert ranks.run(3, load_one, name, sites.get(name), str(tmp_path), expected, timeout=120) == [[], [], []]
    assert load_one(name, sites.get(name), str(tmp_path), expected) == []
