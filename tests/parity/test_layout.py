# SPDX-License-Identifier: Apache-2.0
"""Groups of ranks over hosts, and slices of a parity, for any world."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.errors import ConfigError
from shardckpt.options import Options
from shardckpt.parity.layout import (
    PARITY_PATTERN,
    PARITY_RECORD_PATTERN,
    cut_parity,
    group_ranks,
    parity_file_name,
    parity_record_name,
)

HOSTS = st.lists(st.sampled_from("abcdef"), min_size=2, max_size=40)


@given(HOSTS, st.integers(2, 9))
def test_each_rank_is_in_one_group_and_groups_differ_by_one_rank_at_most(hosts: list[str], size: int) -> None:
    groups = group_ranks(hosts, size)
    assert sorted(rank for group in groups for rank in group) == list(range(len(hosts)))
    sizes = [len(group) for group in groups]
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    assert len(groups) == -(-len(hosts) // size)


@given(HOSTS, st.integers(2, 9))
def test_the_ranks_of_a_host_are_spread_evenly_over_the_groups(hosts: list[str], size: int) -> None:
    groups = group_ranks(hosts, size)
    for host, ranks in Counter(hosts).items():
        held = [sum(hosts[rank] == host for rank in group) for group in groups]
        assert max(held) == -(-ranks // len(groups))
        assert max(held) - min(held) <= 1


@given(HOSTS, st.integers(2, 9))
def test_no_group_lies_within_one_host_when_there_are_others_for_each(hosts: list[str], size: int) -> None:
    groups = group_ranks(hosts, size)
    if len(hosts) - max(Counter(hosts).values()) >= len(groups):
        assert all(len({hosts[rank] for rank in group}) > 1 for group in groups if len(group) > 1)


def test_the_usual_job_has_each_group_on_hosts_of_its_own() -> None:
    hosts = [f"node{rank // 8}" for rank in range(32)]
    groups = group_ranks(hosts, 4)
    assert groups[:2] == ((0, 8, 16, 24), (1, 9, 17, 25))
    assert all(len({hosts[rank] for rank in group}) == 4 for group in groups)


@given(st.lists(st.integers(0, 400), min_size=1, max_size=9), st.sampled_from([1, 4, 16]))
def test_slices_are_whole_blocks_and_cover_the_longest_file(sizes: list[int], block: int) -> None:
    cuts = cut_parity(sizes, block)
    assert len(cuts) <= len(sizes)
    edges = [0, *(stop for _, stop in cuts)]
    assert edges[-1] == max(sizes)
    assert [start for start, _ in cuts] == edges[:-1]
    assert all(start % block == 0 and start < stop for start, stop in cuts)
    lengths = [stop - start for start, stop in cuts]
    assert all(length == lengths[0] for length in lengths[:-1])
    if cuts:
        assert max(lengths) <= -(-max(sizes) // len(sizes)) + block


def test_names_are_told_apart() -> None:
    name, record = parity_file_name(3, 12, "0123456789abcdef"), parity_record_name("0123456789abcdef")
    assert (name, record) == ("parity-00003-00012-0123456789abcdef.xor", "parity-0123456789abcdef.json")
    assert PARITY_PATTERN.match(name) and PARITY_RECORD_PATTERN.match(record)
    assert not PARITY_PATTERN.match(record) and not PARITY_RECORD_PATTERN.match(name)


@pytest.mark.parametrize(
    "parity", ["", "xor", "xor:", "xor:1", "xor:0", "xor:02", "xor:-2", "raid:4", "xor:4 ", "xor:٤", 4, True]
)
def test_what_is_no_parity_is_refused(parity: object) -> None:
    with pytest.raises(ConfigError, match=r"'xor:G'.*at least 2"):
        Options(parity=parity)  # type: ignore[arg-type]  # what is tested


def test_a_world_without_room_for_a_group_is_refused_with_advice() -> None:
    with pytest.raises(ConfigError, match=r"one rank.*Leave parity out"):
        Options(parity="xor:2").parity_group(1)
    with pytest.raises(ConfigError, match=r"3 ranks: there are not 4 for a group\. Take 'xor:3'"):
        Options(parity="xor:4").parity_group(3)
    assert Options(parity="xor:4").parity_group(4) == 4
    assert Options().parity_group(1) is None
