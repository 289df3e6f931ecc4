# SPDX-License-Identifier: Apache-2.0
"""What each rank has for itself: PerRank and the random number generators, also on another world size."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch

from shardckpt.errors import StateError, TargetMismatch
from shardckpt.layout import PerRankShapes
from shardckpt.state import PerRank, RNGState, StoredTensor, Whereabouts, capture, open_target
from tests.state.memory import Memory, gather, load, save

RNG = {"rng": RNGState()}


@pytest.fixture(autouse=True)
def generators_are_left_as_they_were() -> Iterator[None]:
    python, legacy, cpu = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(python)
    numpy.random.set_state(legacy)
    torch.set_rng_state(cpu)


def seed(number: int) -> None:
    random.seed(number)
    numpy.random.seed(number)
    torch.manual_seed(number)


def draw() -> list[Any]:
    return [
        random.random(),
        random.gauss(0, 1),
        numpy.random.rand(),
        numpy.random.randn(),
        torch.rand(()).item(),
        torch.randn(17).sum().item(),
    ]


def saved_by(world_size: int) -> Memory:
    captured = []
    for rank in range(world_size):
        seed(rank)
        draw()
        captured.append(capture(RNG, Whereabouts(rank, world_size)))
    return gather(captured)


def drawn_after_load(memory: Memory, rank: int, world_size: int) -> list[Any]:
    seed(999)
    done = load(memory, RNG, Whereabouts(rank, world_size))
    assert not done.missing and not done.unexpected
    return draw()


def test_every_generator_goes_on_where_it_was() -> None:
    seed(3)
    draw()  # leaves the second of a pair of gaussians in Python's and NumPy's generators
    memory = save(RNG)
    expected = draw()
    assert drawn_after_load(memory, 0, 1) == expected
    assert {name for name, _ in memory.own} >= {"rng/python", "rng/numpy", "rng/cpu"}


def test_capturing_draws_nothing() -> None:
    seed(3)
    capture(RNG)
    first = draw()
    seed(3)
    assert draw() == first


@pytest.mark.parametrize("new_size", [1, 2, 3, 5])
def test_ranks_take_their_own_and_further_ranks_get_streams_of_their_own(new_size: int) -> None:
    memory = saved_by(2)
    streams = [drawn_after_load(memory, rank, new_size) for rank in range(new_size)]
    for rank in range(min(new_size, 2)):
        seed(rank)
        draw()
        assert streams[rank] == draw()
    for at in range(len(streams[0])):
        assert len({stream[at] for stream in streams}) == new_size
    assert streams == [drawn_after_load(memory, rank, new_size) for rank in range(new_size)]


def test_generators_of_a_device_that_is_not_here_are_left_out() -> None:
    memory = save(RNG)
    memory.own["rng/cuda", 0] = torch.zeros(16, dtype=torch.uint8)
    memory.tensors["rng/cuda"] = memory.tensors["rng/cpu"]
    assert len(drawn_after_load(memory, 0, 1)) == 6


def test_a_missing_generator_is_missing() -> None:
    memory = save(RNG)
    del memory.tensors["rng/numpy"]
    assert load(memory, RNG).missing == ["rng/numpy"]


def test_generators_of_another_size_are_refused() -> None:
    memory = save(RNG)
    for name in ("python", "cpu"):
        memory.own[f"rng/{name}", 0] = memory.own[f"rng/{name}", 0][:-1]
    for name in ("rng/python", "rng/cpu"):
        memory.tensors[name] = StoredTensor("uint8", PerRankShapes((tuple(memory.own[name, 0].shape),)))
    with pytest.raises(TargetMismatch, match="'rng': the stored random number generators are not of this Python"):
        load(memory, RNG)


def test_another_bit_generator_of_numpy_is_refused() -> None:
    legacy: Any = numpy.random
    before = legacy.get_bit_generator()
    legacy.set_bit_generator(numpy.random.PCG64(1))
    try:
        with pytest.raises(StateError, match="PCG64, not the MT19937"):
            capture(RNG)
    finally:
        legacy.set_bit_generator(before)


def per_rank(rank: int) -> dict[str, Any]:
    return {
        "p": PerRank(
            {"t": torch.full((rank + 1,), rank), "v": {"n": rank, "none": None}, "l": [torch.ones(1) * rank] * (rank + 1)}
        )
    }


def test_per_rank_state_comes_back_to_its_rank() -> None:
    memory = gather([capture(per_rank(rank), Whereabouts(rank, 3)) for rank in range(3)])
    assert memory.tensors["p/t"].shape(2) == (3,)
    for rank in range(2):
        target = per_rank(rank)
        target["p"].value["v"]["n"] = -1
        target["p"].value["t"].fill_(-1)
        done = load(memory, target, Whereabouts(rank, 2))
        assert not done.missing and not done.unexpected and not done.kept
        assert str(target) == str(per_rank(rank))


def test_further_ranks_keep_what_they_have_and_say_so() -> None:
    memory = gather([capture(per_rank(rank), Whereabouts(rank, 2)) for rank in range(2)])
    target = per_rank(2)
    done = load(memory, target, Whereabouts(2, 3))
    assert str(target) == str(per_rank(2))
    assert not done.missing and not done.unexpected
    assert {"p/t"} <= set(done.kept)


def test_a_rank_that_saved_nothing_under_a_name_misses_it() -> None:
    states: list[dict[str, Any]] = [{"p": PerRank({"a": torch.ones(1)})}, {"p": PerRank({"b": torch.ones(1)})}]
    memory = gather([capture(state, Whereabouts(rank, 2)) for rank, state in enumerate(states)])
    target = {"p": PerRank({"a": torch.zeros(1), "b": torch.zeros(1)})}
    done = load(memory, target, Whereabouts(0, 2))
    assert done.missing == ["p/b"] and target["p"].value["a"] == 1


def test_nothing_changes_before_finish() -> None:
    seed(1)
    memory = save(RNG)
    seed(2)
    expected = torch.get_rng_state()
    target = open_target(RNG, memory.index())
    memory.fill(target)
    assert torch.equal(torch.get_rng_state(), expected)
