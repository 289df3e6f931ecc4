# SPDX-License-Identifier: Apache-2.0
"""ElasticSampler: each sample once per epoch, in one global order, whatever the world sizes and wherever a run died."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from shardckpt.errors import ConfigError
from shardckpt.sampler import ElasticSampler, _place


class Squares(Dataset[int]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index * index


def ranks(world_size: int, *args: int, **options: Any) -> list[ElasticSampler]:
    return [ElasticSampler(*args, rank=rank, world_size=world_size, **options) for rank in range(world_size)]


def global_order(num_samples: int, **options: Any) -> list[int]:
    sampler = ElasticSampler(num_samples, num_samples, rank=0, world_size=1, **options)
    return next(sampler.track(sampler))


def run(samplers: list[ElasticSampler], steps: int) -> list[list[int]]:
    """The global batches of the next steps, on all ranks in lockstep, over the ends of epochs."""
    loops = [islice(sampler.track(sampler, repeat=True), steps) for sampler in samplers]
    return [[index for share in shares for index in share] for shares in zip(*loops, strict=True)]


@pytest.mark.slow
@settings(deadline=None, max_examples=200)
@given(
    num_samples=st.integers(1, 300),
    seed=st.integers(0, 2**63 - 1),
    shuffle=st.booleans(),
    lives=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9), st.integers(0, 4), st.integers(6, 20)), max_size=8),
)
def test_any_sequence_of_kills_and_world_sizes_gives_the_one_global_order(
    num_samples: int, seed: int, shuffle: bool, lives: list[tuple[int, int, int, int]]
) -> None:
    """A life is (world size, steps to its last save, steps after it that are lost, global batch)."""
    seen: list[int] = []
    state: dict[str, Any] | None = None
    for world_size, steps, lost, global_batch in lives:
        try:
            samplers = ranks(world_size, num_samples, global_batch, seed=seed, shuffle=shuffle)
            for sampler in samplers:
                if state:
                    sampler.load_state_dict(json.loads(json.dumps(state)))
        except ConfigError as refused:
            assert "a rank without any" in str(refused)
            continue
        for batch in run(samplers, steps):
            seen += batch
        states = [sampler.state_dict() for sampler in samplers]
        assert all(other == states[0] for other in states)
        state = states[0]
        run(samplers, lost)

    one_rank = ElasticSampler(num_samples, 1, seed=seed, shuffle=shuffle, rank=0, world_size=1)
    assert seen == [index for batch in run([one_rank], len(seen)) for index in batch]
    for epoch in range(len(seen) // num_samples):
        assert sorted(seen[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))


@given(st.integers(1, 2000), st.integers(0, 2**63 - 1))
@settings(deadline=None, max_examples=50)
def test_an_epoch_is_a_permutation(num_samples: int, seed: int) -> None:
    assert sorted(global_order(num_samples, seed=seed)) == list(range(num_samples))


@given(st.integers(1, 8), st.integers(8, 50))
@settings(deadline=None)
def test_shares_are_contiguous_and_differ_by_at_most_one(world_size: int, global_batch: int) -> None:
    shares = [next(iter(sampler)) for sampler in ranks(world_size, 1000, global_batch, shuffle=False, drop_last=True)]
    assert [index for share in shares for index in share] == list(range(global_batch))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_order_is_fixed_for_ever() -> None:
    """A run that was saved by an older version must find the same order: these numbers never change."""
    assert global_order(10, seed=7) == [8, 6, 3, 4, 2, 5, 9, 1, 7, 0]
    large = ElasticSampler(10**12, 4, seed=123, rank=0, world_size=1)
    assert next(iter(large)) == [559270430832, 30105493730, 118686501401, 108007586075]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    sampler = ElasticSampler(1000, 1000, seed=0, rank=0, world_size=1)
    orders = [tuple(share) for share in islice(sampler.track(sampler, repeat=True), 4)]
    orders += [tuple(global_order(1000, seed=seed)) for seed in (1, 2, 2**62)]
    assert len(set(orders)) == 7


@pytest.mark.parametrize("num_samples", [5, 64, 100, 1000])
def test_the_shuffle_is_fair(num_samples: int) -> None:
    """Over many seeds, each sample stands at each place about equally often (chi-squared within five sigma)."""
    cells = min(num_samples, 16)
    counts = Counter(
        (place * cells // num_samples, sample * cells // num_samples)
        for seed in range(10_000 // num_samples + 20)
        for place, sample in enumerate(global_order(num_samples, seed=seed))
    )
    total = sum(counts.values())
    sizes = Counter(place * cells // num_samples for place in range(num_samples))
    expected = {(a, b): total * sizes[a] * sizes[b] / num_samples**2 for a in sizes for b in sizes}
    chi2 = sum((counts[cell] - mean) ** 2 / mean for cell, mean in expected.items())
    freedom = (cells - 1) ** 2 * num_samples / (num_samples - 1)
    assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5


def test_drop_last_leaves_the_tail_out() -> None:
    samplers = ranks(3, 20, 6, drop_last=True)
    assert [len(sampler) for sampler in samplers] == [3, 3, 3]
    order = global_order(20)
    assert [index for batch in run(samplers, 3) for index in batch] == order[:18]
    assert run(samplers, 1)[0] != order[18:]
    assert samplers[0].epoch == 1


def test_without_drop_last_the_last_batch_is_smaller() -> None:
    samplers = ranks(2, 20, 6)
    assert [len(batch) for batch in run(samplers, 4)] == [6, 6, 6, 2]
    assert len(samplers[0]) == 0


def test_the_state_between_the_last_batch_and_the_end_of_the_epoch_goes_on_with_the_next() -> None:
    first = ElasticSampler(8, 4, rank=0, world_size=1)
    run([first], 2)
    assert (first.epoch, first.consumed) == (0, 8)
    second = ElasticSampler(8, 4, rank=0, world_size=1)
    second.load_state_dict(first.state_dict())
    assert list(second.track(second)) == []
    assert (second.epoch, second.consumed) == (1, 0)
    assert len(list(second.track(second))) == 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda sampler, **options: DataLoader(Squares(40), batch_sampler=sampler, **options),
        lambda sampler, **options: DataLoader(Rows(40), sampler=sampler, batch_size=None, **options),
    ],
    ids=["batch_sampler", "sampler"],
)
def test_prefetching_workers_do_not_move_the_place(workers: int, make: Callable[..., DataLoader[Any]]) -> None:
    first = ElasticSampler(40, 4, seed=3, rank=0, world_size=1)
    taken: list[int] = []
    for batch in islice(first.track(make(first, num_workers=workers)), 3):
        taken += batch.tolist()
        state = first.state_dict()
    assert state["consumed"] == 12
    second = ElasticSampler(40, 4, seed=3, rank=0, world_size=1)
    second.load_state_dict(state)
    rest = [value for batch in second.track(make(second, num_workers=workers)) for value in batch.tolist()]
    assert taken + rest == [index * index for index in global_order(40, seed=3)]


class Rows(Dataset[torch.Tensor]):
    """A dataset that takes a list of indices at once."""

    def __init__(self, length: int) -> None:
        self.values = torch.arange(length) ** 2

    def __getitem__(self, indices: list[int]) -> torch.Tensor:
        return self.values[indices]


def test_a_place_that_is_not_known_is_an_error() -> None:
    sampler = ElasticSampler(40, 4, rank=0, world_size=1)
    assert sampler.state_dict()["consumed"] == 0
    next(iter(DataLoader(Squares(40), batch_sampler=sampler)))
    with pytest.raises(ConfigError, match=r"for batch in sampler\.track\(loader\)"):
        sampler.state_dict()


def test_a_loader_of_something_else_is_an_error() -> None:
    sampler = ElasticSampler(40, 4, rank=0, world_size=1)
    with pytest.raises(ConfigError, match="takes no indices from this sampler"):
        next(sampler.track(DataLoader(Squares(40), batch_size=4)))


def test_loading_inside_a_loop_is_an_error() -> None:
    sampler = ElasticSampler(40, 4, rank=0, world_size=1)
    start = sampler.state_dict()
    loop = sampler.track(sampler)
    next(loop)
    sampler.load_state_dict(start)
    with pytest.raises(ConfigError, match="before the loop"):
        next(loop)


@pytest.mark.parametrize(
    ("changed", "name"),
    [({"num_samples": 41}, "num_samples"), ({"seed": 1}, "seed"), ({"shuffle": False}, "shuffle")],
)
def test_another_order_is_refused_at_resume(changed: dict[str, Any], name: str) -> None:
    options = {"num_samples": 40, "seed": 0, "shuffle": True}
    saved = ElasticSampler(**options, global_batch=4, rank=0, world_size=1).state_dict()  # type: ignore[arg-type]
    other = ElasticSampler(**{**options, **changed}, global_batch=4, rank=0, world_size=1)
    with pytest.raises(ConfigError, match=f"saved with {name}=") as error:
        other.load_state_dict(saved)
    assert (error.value.stored, error.value.given) == (options[name], changed[name])


@pytest.mark.parametrize(
    "change",
    [{"consumed": 41}, {"consumed": -1}, {"consumed": 1.5}, {"consumed": True}, {"epoch": -1}, {"epoch": 2**60}],
)
def test_a_place_outside_the_data_is_refused(change: dict[str, Any]) -> None:
    sampler = ElasticSampler(40, 4, rank=0, world_size=1)
    with pytest.raises(ConfigError, match=next(iter(change))):
        sampler.load_state_dict({**sampler.state_dict(), **change})


def test_a_foreign_state_is_refused() -> None:
    sampler = ElasticSampler(40, 4, rank=0, world_size=1)
    with pytest.raises(ConfigError, match="not a state of an ElasticSampler"):
        sampler.load_state_dict({"epoch": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be"),
        ({"num_samples": 2.0}, "num_samples must be"),
        ({"global_batch": 1}, "global_batch must be an integer from 2"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**63}, "seed must be"),
        ({"rank": 2}, "rank must be an integer from 0 to 1"),
        ({"world_size": 0}, "world_size must be"),
        ({"world_size": None}, "rank and world_size go together"),
        ({"num_samples": 41}, "drop_last=True"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ElasticSampler(**{"num_samples": 40, "global_batch": 4, "rank": 0, "world_size": 2, **options})


def test_one_of_several_processes_without_a_process_group_is_refused() -> None:
    with pytest.raises(ConfigError, match="init_process_group"):
        _place(None, None, {"WORLD_SIZE": "4"})
    assert _place(None, None, {"WORLD_SIZE": "1"}) == _place(None, None, {}) == (0, 1)
