# SPDX-License-Identifier: Apache-2.0
"""Whatever the order in which ranks call, ask, answer and hear: all ranks keep the same appointments, and none is missed."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shardckpt.diary import Answer, Diary, Reason, Verdict, decide
from shardckpt.errors import CheckpointerClosed, RankTimeout
from shardckpt.failure import describe

PATIENCE = 30.0


def test_the_call_is_the_first_that_no_rank_has_made() -> None:
    assert decide([Answer(7, []), Answer(9, []), Answer(8, [])]).call == 10
    assert decide([Answer(0, [])]).call == 1


def test_equal_reasons_of_several_ranks_are_one() -> None:
    term = [Reason("signal 15", 15, rank) for rank in range(4)]
    timer = Reason("every 60 s")
    verdict = decide([Answer(1, [timer]), Answer(1, [term[1]]), Answer(1, []), Answer(1, [term[3]])])
    assert verdict.reasons == [timer, Reason("signal 15", 15, rank=1, ranks=2)]
    assert [str(reason) for reason in verdict.reasons] == ["every 60 s", "signal 15 on 2 ranks"]


def test_a_reason_stands_until_a_verdict_meets_it() -> None:
    diary, reason = Diary(), Reason("signal 15", 15)
    diary.want(reason)
    diary.want(reason)
    assert diary.answer() == Answer(0, [reason])
    diary.settle(Verdict(0, [], describe(RankTimeout("rank 1", ranks=[1]))))
    assert diary.answer() == Answer(0, [reason])
    diary.settle(Verdict(2, [reason]))
    assert diary.answer() == Answer(0, [])
    diary.settle(Verdict(2, []))
    with pytest.raises(RankTimeout, match="rank 1"):
        diary.arrive(PATIENCE)
    assert diary.arrive(PATIENCE) == [reason]


def test_two_appointments_may_fall_on_one_call() -> None:
    diary, reasons = Diary(), [Reason("every 60 s"), Reason("signal 15", 15)]
    for reason in reasons:
        diary.answer()
        diary.settle(Verdict(1, [reason]))
    assert diary.arrive(PATIENCE) == reasons
    assert diary.arrive(PATIENCE) == []


def test_a_call_does_not_wait_for_ever() -> None:
    diary = Diary()
    diary.answer()
    with pytest.raises(
        RankTimeout, match=r"'should_save': rank 0 asked all ranks how far they are, and decided nothing within 0.01 s"
    ):
        diary.arrive(0.01)
    diary.settle(Verdict(2, [Reason("every 60 s")]))
    assert diary.arrive(PATIENCE) == [Reason("every 60 s")]


def test_what_ends_it_wakes_a_call_that_waits() -> None:
    diary = Diary()
    diary.answer()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(diary.arrive, PATIENCE)
        diary.give_up(describe(CheckpointerClosed("closed")))
        diary.give_up(describe(RankTimeout("rank 0 is gone")))
        with pytest.raises(CheckpointerClosed, match="closed"):
            call.result(PATIENCE)
    with pytest.raises(CheckpointerClosed):
        diary.arrive(PATIENCE)


def reasons_of(call: Future[list[Reason]]) -> list[Reason]:
    return [] if call.exception() else call.result()


class Job(RuleBasedStateMachine):
    """Three ranks, each with a thread that trains, and every message between them in any order."""

    WORLD_SIZE = 3

    def __init__(self) -> None:
        super().__init__()
        self.diaries = [Diary() for _ in range(self.WORLD_SIZE)]
        self.pools = [ThreadPoolExecutor(1) for _ in self.diaries]
        self.calls: list[list[Future[list[Reason]]]] = [[] for _ in self.diaries]
        self.answers: dict[int, Answer] = {}
        self.verdicts: dict[int, Verdict] = {}
        self.asked = 0
        self.met: list[Reason] = []

    def teardown(self) -> None:
        """Whatever is under way comes to its end; then every wish was met, at a call that every rank has made."""
        everyone = range(self.WORLD_SIZE)
        for _ in range(2):
            for rank in everyone:
                self.answer(rank)
            for rank in everyone:
                self.hear(rank, again=False)
        last = max(map(len, self.calls)) + 1
        for rank in everyone:
            while len(self.calls[rank]) < last:
                self.call(rank)
        self.everybody_saves_at_the_same_calls()
        assert len(self.met) == self.asked
        assert sum(len(reasons_of(call)) for call in self.calls[0]) == self.asked
        for pool in self.pools:
            pool.shutdown()

    @rule(rank=st.integers(0, WORLD_SIZE - 1))
    def call(self, rank: int) -> None:
        if not self.calls[rank] or self.calls[rank][-1].done():
            entered = threading.Event()

            def arrive() -> list[Reason]:
                entered.set()
                return self.diaries[rank].arrive(PATIENCE)

            self.calls[rank].append(self.pools[rank].submit(arrive))
            entered.wait(PATIENCE)
            self.let_pass(rank)

    def let_pass(self, rank: int) -> None:
        """A call that nothing holds comes back."""
        if rank not in self.answers and self.calls[rank]:
            error = self.calls[rank][-1].exception(PATIENCE)
            assert error is None or str(error) == "too late"

    @rule(rank=st.integers(0, WORLD_SIZE - 1))
    def ask(self, rank: int) -> None:
        self.asked += 1
        self.diaries[rank].want(Reason(f"wish {self.asked}", rank=rank))

    @rule(rank=st.integers(0, WORLD_SIZE - 1))
    def answer(self, rank: int) -> None:
        if rank in self.answers or self.verdicts:
            return
        self.answers[rank] = self.diaries[rank].answer()
        if len(self.answers) == self.WORLD_SIZE:
            verdict = decide([self.answers[rank] for rank in range(self.WORLD_SIZE)])
            self.met += verdict.reasons
            self.verdicts = dict.fromkeys(range(self.WORLD_SIZE), verdict)

    @precondition(lambda self: self.answers and not self.verdicts)
    @rule()
    def lose_patience(self) -> None:
        self.verdicts = dict.fromkeys(range(self.WORLD_SIZE), Verdict(0, [], describe(RankTimeout("too late"))))

    @precondition(lambda self: self.verdicts)
    @rule(rank=st.integers(0, WORLD_SIZE - 1), again=st.booleans())
    def hear(self, rank: int, again: bool) -> None:
        """``again``: the next appointment begins before a call that waits has woken up."""
        if rank not in self.verdicts:
            return
        if rank not in self.answers:
            self.diaries[rank].answer()
        self.diaries[rank].settle(self.verdicts.pop(rank))
        self.answers.pop(rank, None)
        if again and not self.verdicts:
            self.answer(rank)
        else:
            self.let_pass(rank)

    @invariant()
    def everybody_saves_at_the_same_calls(self) -> None:
        done = [[reasons_of(call) for call in calls if call.done()] for calls in self.calls]
        for results in zip(*done, strict=False):
            assert all(result == results[0] for result in results)
        longest = max(done, key=len)
        kept = [reason for reasons in longest for reason in reasons]
        assert kept == self.met[: len(kept)]


Job.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_job = Job.TestCase
