# SPDX-License-Identifier: Apache-2.0
"""The power goes after any system call while something is made for another program: it is there whole, or as before."""

from __future__ import annotations

import pytest

from tests.power.exports import EXPORTS, exported, first_problem


@pytest.mark.parametrize("name", EXPORTS)
def test_what_is_exported_is_there_whole_or_as_before(name: str) -> None:
    export, versions = EXPORTS[name]
    assert first_problem(exported(export).moments, versions) is None


@pytest.mark.parametrize("name", EXPORTS)
def test_without_any_one_flush_a_promise_is_broken(name: str) -> None:
    export, versions = EXPORTS[name]
    flushes = list(exported(export).flushes)
    problems = {flush: first_problem(exported(export, flush).moments, versions) for flush in flushes}
    print("", *(f"without {' > '.join(flush)}: {problem}" for flush, problem in problems.items()), sep="\n")
    assert [flush for flush, problem in problems.items() if problem is None] == []
