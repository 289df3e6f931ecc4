# SPDX-License-Identifier: Apache-2.0
"""How ranks come to know each other's tables: each distinct one travels once, and not at all when nothing changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from shardckpt.errors import ReplicaDivergence, StateError
from shardckpt.exchange import Exchanged, Statement, exchange
from tests.engine.recording import connect
from tests.ranks import RankPool

TABLE = {kind: kind.encode() * 1000 for kind in "abcdefgh"}


def exchange_once(
    tables: str, shapes: list[dict[str, Any]], values: list[dict[str, Any]]
) -> tuple[Exchanged, list[tuple[str, int]]]:
    """What this rank learns, and what it posted."""
    rank = dist.get_rank()
    with connect() as coordinator:
        statement = Statement(TABLE[tables[rank]], shapes[rank], values[rank])
        return exchange(coordinator, "test", lambda: statement), coordinator.log


def test_distinct_tables_travel_once(ranks: RankPool) -> None:
    found = ranks.run(4, exchange_once, "abab", [{}] * 4, [{"v": 1}] * 4)
    for exchanged, _ in found:
        assert exchanged.tables == (TABLE["a"], TABLE["b"])
        assert exchanged.table_of == (0, 1, 0, 1)
        assert exchanged.shapes == ({},) * 4
        assert exchanged.values == {"v": 1}
    assert len({exchanged.nonce for exchanged, _ in found}) == 1
    assert len({exchanged.key for exchanged, _ in found}) == 1
    posted = [dict(log)["test: distinct tables"] for _, log in found]
    assert min(posted[:2]) > 1000
    assert max(posted[2:]) < 20


def test_shapes_of_ranks_are_told(ranks: RankPool) -> None:
    shapes = [{"r": (3,)}, {}, {"r": (4, 5)}]
    for exchanged, _ in ranks.run(3, exchange_once, "aaa", shapes, [{}] * 3):
        assert exchanged.tables == (TABLE["a"],)
        assert list(exchanged.shapes) == shapes


def test_values_are_put_together_on_rank_0(ranks: RankPool) -> None:
    values = [{"o:common": [1], "o:first": True}, {"o:common": [1]}, {"o:common": [1], "o:last": {"x": "y"}}]
    found = ranks.run(3, exchange_once, "aaa", [{}] * 3, values)
    assert found[0][0].values == {"o:common": [1], "o:first": True, "o:last": {"x": "y"}}
    assert [exchanged.values for exchanged, _ in found[1:]] == values[1:]


def test_one_rank_alone_tells_itself(ranks: RankPool) -> None:
    ((exchanged, _),) = ranks.run(1, exchange_once, "a", [{"r": (1,)}], [{"v": 1}])
    assert exchanged.tables == (TABLE["a"],)
    assert exchanged.shapes == ({"r": (1,)},)


@pytest.mark.parametrize(
    ("values", "names", "at"),
    [
        ([1, 1, 2], ["v"], [0, 2]),
        ([1, 2, 2], ["v"], [0, 1]),
        ([True, 1, True], ["v"], [0, 1]),
        ([[1.0], [1], [1.0]], ["v"], [0, 1]),
    ],
)
def test_values_that_differ_are_named(ranks: RankPool, values: list[Any], names: list[str], at: list[int]) -> None:
    statements = [{"object:v": value, "object:other": 0} for value in values]
    for outcome in ranks.run_expecting_errors(3, exchange_once, "aaa", [{}] * 3, statements):
        assert isinstance(outcome, ReplicaDivergence)
        assert outcome.names == names
        assert outcome.ranks[:2] == at
        assert "'v' differs between ranks" in outcome.message
        assert "one that is meant to differ goes into PerRank(...)" in outcome.message


def exchange_repeatedly(changes: list[str]) -> list[tuple[bool, list[str], bytes]]:
    """One exchange after the other with what was known; True where the tables were told again."""
    rank = dist.get_rank()
    key, found = b"", []
    with connect() as coordinator:
        for number, tables in enumerate(changes):
            statement = Statement(TABLE[tables[rank]], {}, {"step": number})
            exchanged = exchange(coordinator, "test", lambda statement=statement: statement, key)  # type: ignore[misc]
            key = exchanged.key
            found.append((exchanged.tables is not None, coordinator.labels(), key))
    return found


def test_nothing_is_told_again_when_no_table_changed(ranks: RankPool) -> None:
    for found in ranks.run(3, exchange_repeatedly, ["aba", "aba", "abb", "abb", "aba"]):
        assert [told for told, _, _ in found] == [True, False, True, False, True]
        assert [len(labels) for _, labels, _ in found] == [2, 1, 2, 1, 2]
        assert found[0][2] == found[1][2] == found[4][2] != found[2][2]


def fail_on(bad: list[int]) -> None:
    rank = dist.get_rank()

    def make() -> Statement:
        if rank in bad:
            raise StateError(f"no state on rank {rank}")
        return Statement(b"", {}, {})

    with connect() as coordinator:
        exchange(coordinator, "test", make)


def test_one_ranks_error_is_raised_on_all(ranks: RankPool) -> None:
    outcomes = ranks.run_expecting_errors(3, fail_on, [1])
    assert all(isinstance(outcome, StateError) for outcome in outcomes)
    assert all("no state on rank 1" in str(outcome) for outcome in outcomes)
