# SPDX-License-Identifier: Apache-2.0
"""Saves come when the schedule says, and cost what they may cost; in training that is simulated, with a clock of its own."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.errors import ConfigError
from shardckpt.options import Schedule
from shardckpt.pacing import Pacer

# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_steps": 0}, r"every_steps=0 is not an int of at least 1 \(or None\)"),
        ({"every_steps": True}, "every_steps=True is not an int"),
        ({"every_steps": 2.0}, r"every_steps=2\.0 is not an int"),
        ({"every_seconds": 0}, r"every_seconds=0 is not a number of seconds above 0 \(or None\)"),
        ({"every_seconds": float("nan")}, "every_seconds=nan is not"),
        ({"every_seconds": float("inf")}, "every_seconds=inf is not"),
        ({"every_seconds": True}, "every_seconds=True is not"),
        ({"every_seconds": "60"}, "every_seconds='60' is not"),
        ({"continuous": 1}, "continuous=1 is not True or False"),
        ({"max_overhead": 2}, r"max_overhead=2 is not a share between 0 and 1 .* 0\.02 lets saves take two per cent"),
        ({"max_overhead": 0.0}, r"max_overhead=0\.0 is not"),
        ({"max_overhead": 1}, "max_overhead=1 is not"),
        ({"max_overhead": float("nan")}, "max_overhead=nan is not"),
        (
            {"every_seconds": 60, "continuous": True},
            "every_seconds and continuous do not go together: each says by itself .* Keep one of them",
        ),
        ({"every_seconds": 60, "max_overhead": 0.02}, "every_seconds and max_overhead do not go together"),
        ({"continuous": True, "max_overhead": 0.02}, "continuous and max_overhead do not go together"),
    ],
)
def test_refusals_say_what_is_accepted(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule(**options)


@pytest.mark.parametrize("options", [{"every_seconds": 60}, {"continuous": True}, {"max_overhead": 0.02}])
def test_steps_may_stand_beside_time(options: dict[str, Any]) -> None:
    assert Schedule(every_steps=100, **options).timed
    assert not Schedule(every_steps=100).timed


# --- training that is simulated


@dataclasses.dataclass
class FakeSave:
    begun: float
    ends: float
    clock: Callable[[], float]
    stall: float = 0.0
    fails: bool = False

    @property
    def error(self) -> Exception | None:
        return OSError("full") if self.fails and self.done() else None

    def done(self) -> bool:
        return self.clock() >= self.ends


class Training:
    """Steps of ``step`` seconds, each ended by a tick; saves of which each takes ``stall`` seconds and then ``flight``.

    While a save is under way, steps take ``slower`` times as long, in proportion to the part of the step.
    """

    def __init__(self, schedule: Schedule, *, step: float = 1.0, stall: float = 0.0, flight: float = 0.0, slower: float = 1.0):
        self.now = 100.0
        self.step, self.stall, self.flight, self.slower = step, stall, flight, slower
        self.pacer = Pacer(schedule, lambda: self.now)
        self.save: FakeSave | None = None
        self.saves: list[float] = []
        self.reasons: list[str] = []
        self.useful = 0.0
        self.fails = False
        """Whether saves that begin now are going to fail."""

    def run(self, steps: int, noise: Callable[[int], float] = lambda _: 1.0) -> Training:
        for number in range(steps):
            self.train(self.step * noise(number))
            reason = self.pacer.tick()
            if reason is not None:
                self.reasons.append(reason)
                self.pacer.granted()
                self.begin_save()
        return self

    def train(self, work: float) -> None:
        self.useful += work
        left = max(0.0, self.save.ends - self.now) if self.save else 0.0
        burdened = min(work, left / self.slower)
        self.now += burdened * self.slower + (work - burdened)

    def begin_save(self) -> None:
        begun = self.now
        self.saves.append(begun)
        self.now += self.stall
        self.save = FakeSave(begun, self.now + self.flight, lambda: self.now, self.stall, self.fails)
        self.pacer.save_began(self.save)

    @property
    def lost(self) -> float:
        return self.now - 100.0 - self.useful

    @property
    def overhead(self) -> float:
        return self.lost / (self.lost + self.useful)


def test_every_so_many_seconds() -> None:
    training = Training(Schedule(every_seconds=60), step=7.0).run(60)
    assert training.saves[0] == 100 + 7 + 63
    assert set(gaps(training.saves)) == {63.0}
    assert set(training.reasons) == {"a save every 60 s"}


def test_a_save_by_hand_restarts_the_clock() -> None:
    training = Training(Schedule(every_seconds=60)).run(50)
    training.begin_save()
    assert training.run(59).saves == [150.0]
    assert training.run(1).saves == [150.0, 210.0]


def test_no_save_is_due_while_one_is_under_way() -> None:
    training = Training(Schedule(every_seconds=10), flight=35.0).run(101)
    assert gaps(training.saves) == [35.0, 35.0]


def test_continuous_saves_follow_each_other() -> None:
    training = Training(Schedule(continuous=True), flight=3.5).run(20)
    assert training.saves == [101.0, 105.0, 109.0, 113.0, 117.0]


def gaps(saves: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(saves)]


def test_saves_that_fail_in_a_row_are_tried_less_and_less_often() -> None:
    training = Training(Schedule(continuous=True), step=0.5)
    training.fails = True
    training.run(3000)
    assert gaps(training.saves) == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 300.0, 300.0, 300.0]
    training.fails = False
    before = len(training.saves)
    training.run(700)
    assert gaps(training.saves[before:])[-1] == 0.5


def test_cheap_failures_do_not_make_saves_with_a_limited_share_frequent() -> None:
    training = Training(Schedule(max_overhead=0.5), step=0.25, stall=0.01)
    training.fails = True
    training.run(400)
    assert [round(gap) for gap in gaps(training.saves)][2:] == [4, 8, 16, 32]


def test_one_request_is_made_per_save() -> None:
    """It may take some steps until the ranks have agreed, or until the user saves."""
    clock = [0.0]
    pacer = Pacer(Schedule(continuous=True), lambda: clock[0])
    assert pacer.tick() == "continuous saves"
    assert [pacer.tick() for _ in range(5)] == [None] * 5
    pacer.granted()
    # True was ignored, so it is asked again.
    assert pacer.tick() == "continuous saves"


@pytest.mark.parametrize(
    "costs",
    [
        {"stall": 0.5},
        {"stall": 30.0},
        {"flight": 40.5, "slower": 1.08},
        {"stall": 2.0, "flight": 20.0, "slower": 1.5},
        {"stall": 0.1, "flight": 0.4, "slower": 2.0},
    ],
)
@pytest.mark.parametrize("share", [0.02, 0.1])
def test_saves_cost_the_share_that_they_may(costs: dict[str, float], share: float) -> None:
    training = Training(Schedule(max_overhead=share), **costs)
    assert training.run(30_000).saves[0] == 101.0
    # Where even one save after the other costs less, that is all there is to get.
    most = Training(Schedule(continuous=True), **costs).run(1000).overhead
    assert 0.9 * min(share, most) < training.overhead < 1.04 * share


@given(
    st.floats(0.001, 100), st.floats(0, 3), st.floats(0.01, 50), st.floats(1, 3), st.floats(0.01, 0.3), st.integers(0, 10_000)
)
def test_saves_never_cost_much_more_than_they_may(
    step: float, stall: float, flight: float, slower: float, share: float, seed: int
) -> None:
    rng = random.Random(seed)
    stall, flight = stall * step, flight * step
    training = Training(Schedule(max_overhead=share), step=step, stall=stall, flight=flight, slower=slower)
    training.run(1500, lambda _: rng.uniform(0.8, 1.2))
    # The last one's time to earn what it cost may not be over.
    assert training.lost < 1.3 * share * (training.lost + training.useful) + stall + flight


def test_the_interval_follows_when_saves_become_slower() -> None:
    training = Training(Schedule(max_overhead=0.02), stall=1.0).run(2000)
    before = training.saves[-1] - training.saves[-2]
    training.stall = 4.0
    training.run(4000)
    after = training.saves[-1] - training.saves[-2]
    assert before == pytest.approx(50.0, abs=1.0)
    assert after == pytest.approx(200.0, abs=5.0)
    assert training.reasons[-1].startswith("the last save cost 4 s, 0.02 of the 20")


def test_evaluations_are_not_taken_for_the_cost_of_saves() -> None:
    """Every tenth step takes 50 times as long, with or without a save."""
    training = Training(Schedule(max_overhead=0.02), stall=1.0, flight=5.0)
    training.run(20_000, lambda number: 50.0 if number % 10 == 7 else 1.0)
    gaps = [after - before for before, after in zip(training.saves[1:], training.saves[2:], strict=False)]
    assert max(gaps) < 400


def test_a_state_that_costs_nothing_is_saved_all_the_time() -> None:
    training = Training(Schedule(max_overhead=0.02), flight=2.5).run(100)
    assert len(training.saves) > 25
