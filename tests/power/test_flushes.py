# SPDX-License-Identifier: Apache-2.0
"""Each flush of the engine is needed: without any one of them, a power cut breaks a promise, and the tests of power cuts tell.

``pytest -s tests/power/test_flushes.py`` prints a line for each flush.
"""

from __future__ import annotations

import ast

import pytest

from tests.power.exports import EXPORTS, exported
from tests.power.flushes import Flush
from tests.power.judge import Judge
from tests.power.worlds import WORLDS, on_disk
from tests.style.source import modules

ENOUGH = ("saves", "saves that replace", "commit found after a kill", "two ranks", "files", "file of another")
"""Worlds in which all flushes are carried out."""
FLUSHING = {"fsync", "sync", "sync_path", "sync_if_there", "_sync_above"}
"""Methods of the storage room that flush."""


def flushes() -> dict[Flush, list[str]]:
    """The worlds in which each flush is carried out."""
    found: dict[Flush, list[str]] = {}
    for name in ENOUGH:
        for flush in on_disk(WORLDS[name]).flushes:
            found.setdefault(flush, []).append(name)
    return found


def caught(flush: Flush, worlds: list[str]) -> tuple[int, str | None]:
    """States tried until a power cut breaks a promise when ``flush`` does nothing, and that promise."""
    tried = 0
    for name in worlds:
        judge = Judge(saves_again=False)
        problem = judge.first_problem(on_disk(WORLDS[name], ignored=flush).moments)
        tried += judge.tried
        if problem:
            return tried, f"{name}: {problem}"
    return tried, None


@pytest.mark.slow
def test_without_any_one_flush_a_promise_is_broken() -> None:
    superfluous = []
    for flush, worlds in flushes().items():
        tried, problem = caught(flush, worlds)
        print(f"\nwithout {' > '.join(flush)}: {tried} states, {problem}")
        if problem is None:
            superfluous.append(flush)
    assert not superfluous


def test_every_flush_in_the_source_is_tried() -> None:
    tried = [*flushes(), *(flush for export, _ in EXPORTS.values() for flush in exported(export).flushes)]
    reached = {line.rsplit(".", 1)[0] + ":" + line.rsplit(":", 1)[1] for flush in tried for line in flush}
    written = {
        f"{module.path.stem}:{node.lineno}"
        for module in modules("shardckpt/store")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FLUSHING
    }
    # the door to the operating system itself, which the simulated disk stands in for, and a trial, which keeps nothing
    written = {place for place in written if not place.startswith(("filesystem:", "trial:"))}
    assert len(written) > 8
    assert written <= reached
