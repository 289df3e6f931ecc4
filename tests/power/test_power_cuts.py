# SPDX-License-Identifier: Apache-2.0
"""The power goes after any system call of a save, a prune or a put: what may be left keeps every promise.

``pytest -s tests/power`` prints how many states were tried; SHARDCKPT_POWER_SEEDS=N tries N orders of ranks instead of a few.
"""

from __future__ import annotations

import os
import random
from functools import partial

import pytest

from tests.power.crash import Crash
from tests.power.disk import Disk
from tests.power.judge import ROOT, Judge
from tests.power.worlds import WORLDS, files, on_disk, saves_of_ranks

SEEDS = int(os.environ.get("SHARDCKPT_POWER_SEEDS", "6"))
WITHOUT_LINKS = ("saves", "saves that replace", "files")
SMALL = ("files", "file of another")
"""Worlds with few states."""


def tell(what: str, disk: Disk, judge: Judge) -> None:
    print(f"\npower cuts, {what}: {len(disk.moments)} moments, {judge.tried} states, {len(judge.known)} different")


@pytest.mark.parametrize(
    ("name", "links"),
    [
        pytest.param(name, links, marks=[] if name in SMALL else [pytest.mark.slow])
        for links, names in ((True, WORLDS), (False, WITHOUT_LINKS))
        for name in names
    ],
    ids=str,
)
def test_every_state_keeps_the_promises(name: str, links: bool) -> None:
    disk = on_disk(WORLDS[name], links=links)
    judge = Judge(links, saves_again=not name.startswith("file"))
    assert judge.first_problem(disk.moments) is None
    tell(name if links else f"{name}, without hard links", disk, judge)
    assert judge.tried > len(disk.moments)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
def test_sampled_states_of_more_ranks_keep_the_promises(seed: int) -> None:
    disk = on_disk(partial(saves_of_ranks, world_size=3 + seed % 3, seed=seed))
    judge = Judge(saves_again=False)
    assert judge.first_problem(disk.moments, random.Random(seed), samples=60) is None
    tell(f"{3 + seed % 3} ranks, seed {seed}", disk, judge)
    assert judge.tried == 60 * len(disk.moments)


def test_a_file_that_is_put_or_replaced_is_there_whole_or_as_before() -> None:
    disk = on_disk(files)
    put = {image_content(image, "c/d/manifest") for moment in disk.moments for image in Crash(moment).images()}
    assert put == {None, b"content"}
    # made in the second operation, and replaced in a later one
    reports = [number for number, moment in enumerate(disk.moments) if moment.call == disk.moments[-1].call]
    replaced = {image_content(image, "c/another") for m in disk.moments[reports[2] :] for image in Crash(m).images()}
    assert replaced == {b"data", b"other data"}


def image_content(image: frozenset[tuple[str, bytes | None]], name: str) -> bytes | None:
    return dict(image).get(f"{ROOT}/{name}")
