# SPDX-License-Identifier: Apache-2.0
"""Appointments between threads with a real store, and between real ranks that are slow, that leave, or that die."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardckpt.appointment import Appointment, Peers
from shardckpt.coordinate import Coordinator
from shardckpt.diary import Reason
from shardckpt.errors import CheckpointerClosed, CoordinationError, RankTimeout
from shardckpt.wire import tcp_store
from tests.engine.usage import is_dead
from tests.engine.waiting import until
from tests.ranks import RankDied, RankPool, meet

PATIENCE = 30.0
MOST_CALLS = 100_000


class Cluster:
    """The appointments of as many ranks, all in this process, and the store that they share.

    Ranks that are ``late`` do not get through to the store before ``gate`` is set.
    """

    def __init__(self, world_size: int, *, timeout: float = PATIENCE, late: tuple[int, ...] = ()) -> None:
        # both ends of a connection look up the other's name; one lost packet would cost 5 s
        os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
        self.store = tcp_store("localhost", 0, PATIENCE, is_master=True)
        self.gate = threading.Event()
        peers = [Peers(rank=rank, world_size=world_size, hosts="abcd", timeout=timeout) for rank in range(world_size)]
        dials = [self.dial_late if rank in late else self.dial for rank in range(world_size)]
        self.ranks = [Appointment(dataclasses.replace(p, dial=dial)) for p, dial in zip(peers, dials, strict=True)]

    def dial(self) -> Any:
        return tcp_store("localhost", self.store.port, PATIENCE)

    def dial_late(self) -> Any:
        self.gate.wait(PATIENCE)
        return self.dial()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.set()
        # rank 0 first, as is the harder order
        for appointment in self.ranks:
            appointment.close()


def call_until_agreed(appointment: Appointment) -> tuple[int, list[Reason]]:
    for call in range(1, MOST_CALLS):
        if reasons := appointment.arrive():
            return call, reasons
        time.sleep(0.0005)
    raise AssertionError("nothing was agreed")


def on_all(appointments: list[Appointment], job: Callable[[Appointment], Any]) -> list[Any]:
    """Results or exceptions of ``job`` on all ranks at once."""
    with ThreadPoolExecutor(len(appointments)) as pool:
        futures = [pool.submit(job, appointment) for appointment in appointments]
        return [future.exception(2 * PATIENCE) or future.result() for future in futures]


# --- agreement


def test_a_single_rank_agrees_with_itself_at_once() -> None:
    appointment = Appointment(Peers())
    before = threading.active_count()
    assert appointment.arrive() == []
    appointment.request("every 60 s")
    appointment.request("signal 15", 15)
    assert appointment.arrive() == [Reason("every 60 s"), Reason("signal 15", 15)]
    assert appointment.arrive() == []
    assert threading.active_count() == before
    appointment.close()
    with pytest.raises(CheckpointerClosed):
        appointment.arrive()


@pytest.mark.parametrize("who", [0, 2])
def test_any_rank_may_ask(who: int) -> None:
    with Cluster(3) as cluster:
        cluster.ranks[who].request("signal 15", 15)
        outcomes = on_all(cluster.ranks, call_until_agreed)
    assert outcomes == [(outcomes[0][0], [Reason("signal 15", 15, who)])] * 3


def test_all_may_ask_at_once() -> None:
    def ask_and_call(appointment: Appointment) -> tuple[int, list[Reason]]:
        appointment.request("signal 15", 15)
        return call_until_agreed(appointment)

    with Cluster(4) as cluster:
        outcomes = on_all(cluster.ranks, ask_and_call)
        # Whoever was too late for the first appointment got a second one.
        outcomes = [(call, reasons[0].signum) for call, reasons in outcomes]
    assert outcomes == [(outcomes[0][0], 15)] * 4


def test_a_rank_that_makes_no_calls_holds_nobody_up() -> None:
    """It may be in a collective, or compile: its thread answers for it."""
    with Cluster(2) as cluster:
        cluster.ranks[1].request("every 60 s")
        call, reasons = call_until_agreed(cluster.ranks[0])
        assert reasons == [Reason("every 60 s", rank=1)]
        assert [cluster.ranks[1].arrive() for _ in range(call)] == [[]] * (call - 1) + [reasons]


def wish_at_random(rng: random.Random, count: int, appointment: Appointment) -> dict[int, list[str]]:
    """What was kept at the first ``count`` calls at which anything was: all ranks end at the same call."""
    kept: dict[int, list[str]] = {}
    for call in itertools.count():
        if rng.random() < 0.02:
            appointment.request(f"wish {rng.random()}")
        if reasons := appointment.arrive():
            kept[call] = [reason.what for reason in reasons]
            if len(kept) == count:
                break
        if rng.random() < 0.1:
            time.sleep(rng.random() * 0.003)
    return kept


@pytest.mark.slow
def test_many_requests_at_random_are_kept_by_all() -> None:
    with Cluster(3) as cluster:
        generators = map(random.Random, (1, 2, 3))
        jobs = {a: functools.partial(wish_at_random, rng, 31) for a, rng in zip(cluster.ranks, generators, strict=True)}
        outcomes = on_all(cluster.ranks, lambda appointment: jobs[appointment](appointment))
        assert outcomes[0] == outcomes[1] == outcomes[2]
        assert len(outcomes[0]) > 30
        # Two appointments leave at most their verdicts, asks and answers behind.
        assert cluster.store.num_keys() < 20


# --- ranks that do not answer, or are gone


def call_in_spite_of_errors(cluster: Cluster, appointment: Appointment) -> tuple[int, list[RankTimeout]]:
    """The call that was agreed on, and the errors of those before; who is late comes when the first one has raised."""
    errors: list[RankTimeout] = []
    for call in range(1, MOST_CALLS):
        try:
            if appointment.arrive():
                return call, errors
        except RankTimeout as error:
            errors.append(error)
            cluster.gate.set()
        time.sleep(0.0005)
    raise AssertionError("nothing was agreed")


def test_a_rank_that_does_not_answer_is_named_and_may_come_back() -> None:
    with Cluster(3, timeout=0.5, late=(2,)) as cluster:
        cluster.ranks[1].request("signal 15", 15)
        outcomes = on_all(cluster.ranks, functools.partial(call_in_spite_of_errors, cluster))
    # What was asked for stands.
    assert [call for call, _ in outcomes] == [outcomes[0][0]] * 3
    for _, errors in outcomes[:2]:
        assert errors[0].ranks == [2]
        assert str(errors[0]).startswith("'should_save': no word from rank 2 (c) within 0.5 s; ")


def test_a_rank_that_has_closed_is_named_at_once() -> None:
    with Cluster(3) as cluster:
        cluster.ranks[2].close()
        cluster.ranks[1].request("every 60 s")
        for error in on_all(cluster.ranks[:2], call_until_agreed):
            assert isinstance(error, CoordinationError)
            assert str(error) == "'should_save': rank 2 (c) has closed its Checkpointer"


def test_closing_wakes_a_call_that_waits() -> None:
    with Cluster(2, timeout=2 * PATIENCE, late=(1,)) as cluster, ThreadPoolExecutor(1) as pool:
        cluster.ranks[0].request("every 60 s")
        call = pool.submit(call_until_agreed, cluster.ranks[0])
        # The question that rank 1 does not hear yet.
        cluster.store.wait(["inbox/1/0"])
        cluster.ranks[0].close()
        with pytest.raises(CheckpointerClosed):
            call.result(PATIENCE)


def test_closing_leaves_no_thread_behind() -> None:
    before = set(threading.enumerate())
    with Cluster(3) as cluster:
        cluster.ranks[0].request("every 60 s")
        on_all(cluster.ranks, call_until_agreed)
        assert len(set(threading.enumerate()) - before) >= 6
    assert set(threading.enumerate()) - before == set()


@pytest.mark.slow
def test_a_process_that_forgets_to_close_ends_as_it_should() -> None:
    script = (
        "from shardckpt.appointment import Appointment, Peers\n"
        "from shardckpt.wire import tcp_store\n"
        "server = tcp_store('localhost', 0, 30, is_master=True)\n"
        "dial = lambda: tcp_store('localhost', server.port, 30)\n"
        "ranks = [Appointment(Peers(rank=rank, world_size=2, dial=dial)) for rank in range(2)]\n"
        "ranks[1].request('every 60 s')\n"
        "while not ranks[0].arrive(): pass\n"
        "raise SystemExit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=90).returncode == 7


# --- real ranks


@contextlib.contextmanager
def joined(timeout: float = PATIENCE) -> Iterator[Appointment]:
    with Coordinator.connect(timeout=timeout) as coordinator:
        appointment = Appointment(Peers.of(coordinator, timeout))
        try:
            yield appointment
        finally:
            appointment.close()


def train(wishes: set[tuple[int, int]], steps: int) -> list[int]:
    """Steps of unequal length, each ended by a collective; ranks ask for a save at steps of their own."""
    rank, kept = dist.get_rank(), []
    with joined() as appointment:
        for step in range(steps):
            time.sleep(0.001 * rank)
            if (rank, step) in wishes:
                appointment.request("signal 15", 15)
            dist.all_reduce(torch.ones(1))
            if appointment.arrive():
                kept.append(step)
        dist.barrier()
    return kept


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_real_ranks_agree_on_the_step(ranks: RankPool, world_size: int) -> None:
    last = world_size - 1
    outcomes = ranks.run(world_size, train, {(0, 20), (last, 60)}, 200)
    assert outcomes == [outcomes[0]] * world_size
    first, second = outcomes[0]
    assert 20 <= first < 60 <= second


def wait_for_the_dead(victim: int) -> list[int]:
    pids: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    with joined(timeout=20.0 if victim == 0 else 2.0) as appointment:
        # threads that ask are connected; who dials rank 0 when it is dead tries for long
        appointment.request(f"rank {dist.get_rank()}")
        connected: set[int] = set()
        while len(connected) < dist.get_world_size():
            connected |= {reason.rank for reason in call_until_agreed(appointment)[1]}
        meet("connected")
        if dist.get_rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        # it could still answer
        until(lambda: is_dead(pids[victim]))
        appointment.request("every 60 s")
        try:
            call_until_agreed(appointment)
        except RankTimeout as error:
            return error.ranks
    return []


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_rank_is_named(ranks: RankPool, victim: int) -> None:
    outcomes = ranks.run_expecting_errors(3, wait_for_the_dead, victim)
    assert isinstance(outcomes.pop(victim), RankDied)
    assert outcomes == [[victim]] * 2
