# SPDX-License-Identifier: Apache-2.0
"""Ranks agree, or all of them say why not, in time."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardckpt.coordinate import Coordinator
from shardckpt.errors import ConfigError, CoordinationError, RankFailed, RankTimeout, ShapeMismatch, StorageFull
from tests.ranks import RankDied, RankPool, meet

MIB = 1 << 20
# What a rank may be late beyond a deadline: the engine's own allowance, and a slow machine's.
SLACK = 10.0


def name() -> bytes:
    return f"r{dist.get_rank()}".encode()


def join(payloads: list[bytes]) -> bytes:
    return b" ".join(payloads)


def is_rank(*ranks: int) -> bool:
    return dist.get_rank() in ranks


@contextlib.contextmanager
def joined(timeout: float = 30.0) -> Iterator[Coordinator]:
    with Coordinator.connect(timeout=timeout) as coordinator:
        yield coordinator


def timed(action: Callable[[], Any]) -> tuple[float, BaseException]:
    """Seconds until ``action`` raised, and what."""
    start = time.monotonic()
    try:
        action()
    except BaseException as error:
        return time.monotonic() - start, error
    raise AssertionError("it did not raise")


# --- rounds that end well


def three_rounds() -> tuple[Any, ...]:
    with joined() as coordinator:
        return (
            coordinator.rank,
            coordinator.world_size,
            coordinator.hosts,
            coordinator.num_hosts,
            coordinator.round("join", name, join),
            coordinator.round("nothing"),
            coordinator.broadcast("tell", lambda: f"from {dist.get_rank()}".encode()),
        )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_gets_what_rank_0_decided(ranks: RankPool, world_size: int) -> None:
    payloads = b" ".join(f"r{rank}".encode() for rank in range(world_size))
    hosts = (socket.gethostname(),) * world_size
    expected = [(rank, world_size, hosts, 1, payloads, b"", b"from 0") for rank in range(world_size)]
    assert ranks.run(world_size, three_rounds) == expected


def test_no_process_group_is_one_rank() -> None:
    with Coordinator.connect() as coordinator:
        assert (coordinator.rank, coordinator.world_size, coordinator.hosts) == (0, 1, (socket.gethostname(),))
        assert coordinator.round("alone", lambda: b"me", join) == b"me"
        assert coordinator.exchange_group() is None
        with pytest.raises(ZeroDivisionError):
            coordinator.round("alone", lambda: bytes(1 // 0))


def big_round(size: int) -> tuple[int, int, bool]:
    with joined() as coordinator:
        verdict = coordinator.round("big", lambda: name()[1:] * size, join)
        parts = [str(rank).encode() * size for rank in range(coordinator.world_size)]
        return len(verdict), len(verdict) // size, verdict == b" ".join(parts)


@pytest.mark.parametrize("size", [4 * MIB - 4, 4 * MIB, 8 * MIB, 9 * MIB + 1])
def test_payloads_may_be_larger_than_the_store_takes_at_once(ranks: RankPool, size: int) -> None:
    assert ranks.run(2, big_round, size) == [(2 * size + 1, 2, True)] * 2


def stored_keys(rounds: int) -> list[int]:
    counts = []
    with joined() as coordinator:
        for number in range(rounds):
            payload = name() * (2 * MIB + 1 if number % 10 == 0 else 1)
            coordinator.round(f"round {number}", functools.partial(bytes, payload), join)
            if coordinator.rank == 0:
                # Nobody is in a round now, and the others' next entries come only after this one's answer.
                counts.append(coordinator._server.num_keys())
            coordinator.round("pause")
    return counts


def test_the_store_does_not_grow(ranks: RankPool) -> None:
    counts = ranks.run(2, stored_keys, 50)[0]
    # An old round is deleted while the next one is on, and big values take more keys, but 50 rounds leave nothing behind.
    assert max(counts) <= 15


def two_at_once() -> bytes:
    with joined() as one, joined() as two:
        first = one.round("one", lambda: b"1" + name(), join)
        second = two.round("two", lambda: b"2" + name(), join)
        return first + second + one.round("one again", name, join)


def test_two_coordinators_live_side_by_side(ranks: RankPool) -> None:
    assert ranks.run(2, two_at_once) == [b"1r0 1r12r0 2r1r0 r1"] * 2


def in_background() -> tuple[bytes, float]:
    verdicts: list[bytes] = []
    with joined() as coordinator:
        thread = threading.Thread(target=lambda: verdicts.extend(coordinator.round("save", name, join) for _ in range(100)))
        thread.start()
        total = torch.zeros(1)
        for _ in range(100):
            step = torch.ones(1)
            dist.all_reduce(step)
            total += step
        thread.join()
    assert len(set(verdicts)) == 1
    return verdicts[-1], total.item()


def test_rounds_in_a_thread_do_not_disturb_collectives_of_training(ranks: RankPool) -> None:
    assert ranks.run(2, in_background) == [(b"r0 r1", 200.0)] * 2


def late_start() -> bytes:
    if is_rank(0):
        time.sleep(0.5)
    with joined() as coordinator:
        return coordinator.round("late", name, join)


def test_ranks_may_come_at_different_times(ranks: RankPool) -> None:
    assert ranks.run(3, late_start) == [b"r0 r1 r2"] * 3


def test_another_world_size_after_the_process_group_was_made_anew(ranks: RankPool) -> None:
    for world_size in (2, 3, 2):
        assert ranks.run(world_size, late_start) == [b" ".join(f"r{rank}".encode() for rank in range(world_size))] * world_size


def exchange() -> tuple[float, bool, bool]:
    with joined() as coordinator:
        group = coordinator.exchange_group()
        value = torch.tensor([float(dist.get_rank() + 1)])
        dist.all_reduce(value, group=group)
        same = coordinator.exchange_group() is group
    try:
        dist.get_backend(group)
    except ValueError:
        return value.item(), same, True
    return value.item(), same, False


def test_exchange_group_spans_all_ranks_and_ends_with_the_coordinator(ranks: RankPool) -> None:
    assert ranks.run(2, exchange) == [(3.0, True, True)] * 2


def destroy_before_close() -> bytes:
    with joined() as coordinator:
        coordinator.exchange_group()
        dist.destroy_process_group()
        return coordinator.round("after", timeout=30.0)


def test_the_default_group_may_be_destroyed_before_the_coordinator_is_closed(ranks: RankPool) -> None:
    assert ranks.run(2, destroy_before_close) == [b"", b""]


# --- errors


def fail(bad: dict[int, Any]) -> bytes:
    def produce() -> bytes:
        if dist.get_rank() in bad:
            raise bad[dist.get_rank()]
        return name()

    with joined() as coordinator:
        try:
            coordinator.round("save", produce, join)
        finally:
            # The ranks are still in step after an error.
            assert coordinator.round("after", name, join).count(b"r") == coordinator.world_size
    return b"not raised"


def test_an_error_on_one_rank_is_raised_on_all(ranks: RankPool) -> None:
    outcomes = ranks.run_expecting_errors(3, fail, {1: StorageFull("no space on /data", path="/data", needed=5)})
    assert [type(error) for error in outcomes] == [StorageFull] * 3
    assert [str(error) for error in outcomes] == [
        "rank 1: no space on /data",
        "no space on /data",
        "rank 1: no space on /data",
    ]
    assert [error.details for error in outcomes] == [
        {"path": "/data", "needed": 5, "rank": 1},
        {"path": "/data", "needed": 5},
        {"path": "/data", "needed": 5, "rank": 1},
    ]


def test_an_error_on_rank_0_is_raised_on_all(ranks: RankPool) -> None:
    outcomes = ranks.run_expecting_errors(2, fail, {0: ShapeMismatch("shape (2,) is not (3,)", name="w")})
    assert [str(error) for error in outcomes] == ["shape (2,) is not (3,)", "rank 0: shape (2,) is not (3,)"]
    assert [type(error) for error in outcomes] == [ShapeMismatch] * 2


def test_the_lowest_of_several_failing_ranks_speaks_for_all(ranks: RankPool) -> None:
    outcomes = ranks.run_expecting_errors(4, fail, {3: ValueError("third"), 1: StorageFull("first")})
    assert [type(error) for error in outcomes] == [StorageFull, StorageFull, StorageFull, ValueError]
    assert [str(error) for error in outcomes] == [
        "rank 1: first (failed: ranks 1, 3)",
        "first",
        "rank 1: first (failed: ranks 1, 3)",
        "third",
    ]
    assert outcomes[0].failed == [1, 3]


def test_an_error_from_outside_is_told_with_rank_type_and_text(ranks: RankPool) -> None:
    outcomes = ranks.run_expecting_errors(2, fail, {1: OSError(28, "No space left on device")})
    assert type(outcomes[0]) is RankFailed
    assert str(outcomes[0]) == "rank 1: OSError: [Errno 28] No space left on device"
    assert outcomes[0].details == {"error": "OSError", "rank": 1}
    assert type(outcomes[1]) is OSError


@pytest.mark.parametrize("details", [{"odd": object}, {"text": "\udcff"}, {"number": 1 << 70}])
def test_an_error_that_cannot_travel_whole_still_arrives(ranks: RankPool, details: dict[str, Any]) -> None:
    outcomes = ranks.run_expecting_errors(2, fail, {1: StorageFull("no space in \udcff", **details)})
    assert type(outcomes[0]) is StorageFull
    assert str(outcomes[0]) == "rank 1: no space in \\udcff"
    assert outcomes[0].details == {"rank": 1}


def fail_to_decide(error: Exception) -> None:
    def decide(payloads: list[bytes]) -> bytes:
        raise error

    with joined() as coordinator:
        coordinator.round("commit", name, decide)


def test_an_error_of_the_decision_is_the_same_everywhere(ranks: RankPool) -> None:
    outcomes = ranks.run_expecting_errors(3, fail_to_decide, ShapeMismatch("w differs on ranks 0 and 1", ranks=[0, 1]))
    assert [(type(error), str(error), error.ranks) for error in outcomes] == [
        (ShapeMismatch, "w differs on ranks 0 and 1", [0, 1])
    ] * 3


def test_a_foreign_error_of_the_decision_names_rank_0(ranks: RankPool) -> None:
    outcomes = ranks.run_expecting_errors(2, fail_to_decide, KeyError("w"))
    assert type(outcomes[0]) is KeyError
    assert type(outcomes[1]) is RankFailed
    assert str(outcomes[1]) == "rank 0: KeyError: 'w'"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_a_stopped_rank_stops_all(ranks: RankPool, rank: int, kind: type[BaseException]) -> None:
    outcomes = ranks.run_expecting_errors(2, fail, {rank: kind("by hand")})
    assert type(outcomes[rank]) is kind
    other = outcomes[1 - rank]
    assert type(other) is RankFailed
    assert str(other) == f"rank {rank}: {kind.__name__}: by hand"


def interrupted_while_waiting(rank: int) -> tuple[str, float, str]:
    """Ctrl-C on one rank while it waits for the others."""
    with joined() as coordinator:
        dist.barrier()
        if is_rank(rank):
            threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
            seconds, error = timed(lambda: coordinator.round("save"))
        else:
            time.sleep(2.0)
            seconds, error = (
                timed(lambda: coordinator.round("save")) if rank == 0 else (0.0, Exception(coordinator.round("save")))
            )
        return type(error).__name__, seconds, coordinator.round("after", name, join).decode()


def test_ctrl_c_while_waiting_stops_rank_0_at_once_and_tells_the_others(ranks: RankPool) -> None:
    interrupted, told = ranks.run(2, interrupted_while_waiting, 0)
    assert interrupted[0] == "KeyboardInterrupt"
    assert interrupted[1] < 1.8
    assert told[0] == "RankFailed"
    assert interrupted[2] == told[2] == "r0 r1"


def test_ctrl_c_while_waiting_stops_another_rank_at_once(ranks: RankPool) -> None:
    decided, interrupted = ranks.run(2, interrupted_while_waiting, 1)
    assert interrupted[0] == "KeyboardInterrupt"
    assert interrupted[1] < 1.8
    assert decided[2] == interrupted[2] == "r0 r1"


def diverge() -> tuple[str, dict[str, list[int]], str]:
    with joined() as coordinator:
        _, error = timed(lambda: coordinator.round("restore" if is_rank(1) else "save", name, join))
        assert isinstance(error, CoordinationError)
        return str(error), error.labels, coordinator.round("after", name, join).decode()


def test_ranks_in_different_operations_are_told_so(ranks: RankPool) -> None:
    message = "ranks are in different operations ('save': ranks 0, 2; 'restore': rank 1); all have to call the same"
    assert ranks.run(3, diverge) == [(message, {"save": [0, 2], "restore": [1]}, "r0 r1 r2")] * 3


def nested() -> str:
    with joined() as coordinator:
        _, error = timed(lambda: coordinator.round("outer", lambda: coordinator.round("inner")))
        return str(error)


def test_a_round_inside_of_a_round_is_refused(ranks: RankPool) -> None:
    assert "'inner' cannot be agreed inside of another round" in ranks.run(2, nested)[0]


def test_who_never_came_does_not_come_to_take_leave() -> None:
    """Rank 0 may be gone: to look for it once more would hold up the end, and so the restart."""
    dialled: list[int] = []
    Coordinator(1, 2, 30.0, lambda: dialled.append(1)).close()
    assert dialled == []


def after_close() -> str:
    coordinator = Coordinator.connect(timeout=30)
    coordinator.close()
    coordinator.close()
    return str(timed(lambda: coordinator.round("late"))[1])


def test_close_may_be_called_twice_and_ends_all_rounds(ranks: RankPool) -> None:
    assert ranks.run(2, after_close) == ["'late' cannot be agreed: the coordinator is closed"] * 2


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf")])
def test_timeouts_are_checked(timeout: float) -> None:
    with pytest.raises(ConfigError, match="positive, finite number of seconds"):
        Coordinator.connect(timeout=timeout)
    with Coordinator.connect() as coordinator, pytest.raises(ConfigError, match="positive, finite"):
        coordinator.round("save", timeout=timeout)


# --- ranks that do not come


def miss(absent: tuple[int, ...], seconds: float, default: float) -> tuple[float, str, list[int], str]:
    """Some ranks come two seconds after the deadline; what each rank is told, and whether all are in step again."""
    with joined(timeout=default) as coordinator:
        dist.barrier()
        if is_rank(*absent):
            time.sleep(seconds + 2.0)
        took, error = timed(lambda: coordinator.round("save", name, join, timeout=seconds))
        assert isinstance(error, RankTimeout), repr(error)
        return took, str(error), error.ranks, coordinator.round("after", name, join, timeout=30.0).decode()


@pytest.mark.parametrize("absent", [(2,), (1, 3)])
def test_missing_ranks_are_named_on_every_rank_in_time(ranks: RankPool, absent: tuple[int, ...]) -> None:
    outcomes = ranks.run(4, miss, absent, 1.0, 30.0)
    host = socket.gethostname()
    names = ", ".join(f"{rank} ({host})" for rank in absent)
    for rank, (took, message, missing, after) in enumerate(outcomes):
        assert message.startswith(f"'save': no word from rank{'s' if len(absent) > 1 else ''} {names} within 1 s; ")
        assert missing == list(absent)
        assert after == "r0 r1 r2 r3"
        if rank in absent:
            assert took < 0.9
        else:
            assert 0.9 < took < 1.0 + SLACK


def test_missing_rank_0_is_named_on_every_rank_in_time(ranks: RankPool) -> None:
    outcomes = ranks.run(3, miss, (0,), 1.0, 30.0)
    for took, message, missing, after in outcomes:
        assert message.startswith(f"'save': no word from rank 0 ({socket.gethostname()}) within 1 s; ")
        assert missing == [0]
        assert after == "r0 r1 r2"
        assert took < 1.0 + SLACK


def come_late_and_wait() -> tuple[float, str, list[int]]:
    """Rank 0 comes just before rank 1 loses patience, and rank 2 never: who is to blame?"""
    with joined(timeout=30.0) as coordinator:
        dist.barrier()
        time.sleep({0: 1.0, 1: 0.0, 2: 5.0}[dist.get_rank()])
        took, error = timed(lambda: coordinator.round("save", timeout=2.0))
        assert isinstance(error, RankTimeout)
        # Nobody leaves before rank 2 has heard.
        coordinator.round("after", timeout=30.0)
        return took, str(error), error.ranks


def test_a_late_rank_0_is_not_blamed_for_another(ranks: RankPool) -> None:
    outcomes = ranks.run(3, come_late_and_wait)
    assert [ranks_named for _, _, ranks_named in outcomes] == [[2]] * 3


def fail_while_another_is_missing() -> tuple[str, str]:
    def produce() -> bytes:
        if is_rank(1):
            raise StorageFull("disk is full")
        return b""

    with joined() as coordinator:
        dist.barrier()
        if is_rank(2):
            time.sleep(3.0)
        _, error = timed(lambda: coordinator.round("save", produce, timeout=1.0))
        return type(error).__name__, str(error)


def test_a_timeout_tells_what_failed_meanwhile(ranks: RankPool) -> None:
    outcomes = ranks.run(3, fail_while_another_is_missing)
    assert [kind for kind, _ in outcomes] == ["RankTimeout", "StorageFull", "RankTimeout"]
    assert outcomes[0][1].endswith("(meanwhile rank 1: disk is full)")


def miss_connect(absent: int) -> tuple[float, str, list[int], bytes]:
    if is_rank(absent):
        time.sleep(3.0)
    took, error = timed(lambda: Coordinator.connect(timeout=1.0))
    assert isinstance(error, RankTimeout), repr(error)
    # Attempts stay paired, also for the rank that came late.
    with joined() as coordinator:
        return took, str(error), error.ranks, coordinator.round("after", name, join)


@pytest.mark.parametrize("absent", [0, 1])
def test_ranks_that_do_not_connect_are_named(ranks: RankPool, absent: int) -> None:
    outcomes = ranks.run(3, miss_connect, absent)
    for took, message, missing, after in outcomes:
        assert missing == [absent], message
        assert message.startswith(f"'connect': no word from rank {absent} within 1 s; ")
        assert took < 1.0 + SLACK
        assert after == b"r0 r1 r2"


def die(victim: int, inside: bool) -> tuple[float, str, list[int]]:
    def produce() -> bytes:
        if is_rank(victim) and inside:
            os.kill(os.getpid(), signal.SIGKILL)
        return b""

    with joined(timeout=20.0 if victim == 0 else 2.0) as coordinator:
        meet("connected")
        if is_rank(victim) and not inside:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        took, error = timed(lambda: coordinator.round("save", produce))
        assert isinstance(error, RankTimeout), repr(error)
        return took, str(error), error.ranks


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_by_the_others(ranks: RankPool, victim: int, inside: bool) -> None:
    outcomes = ranks.run_expecting_errors(3, die, victim, inside)
    assert isinstance(outcomes[victim], RankDied)
    for rank, outcome in enumerate(outcomes):
        if rank != victim:
            took, message, missing = outcome
            assert missing == [victim], message
            # Rank 0 hosts the store, so its death breaks the connection at once.
            assert took < (15.0 if victim == 0 else 2.0 + SLACK)


def freeze_rank_0() -> tuple[float, str, list[int]] | None:
    with joined(timeout=1.0) as coordinator:
        pids = torch.tensor([os.getpid()])
        dist.broadcast(pids, 0)
        dist.barrier()
        if is_rank(0):
            os.kill(os.getpid(), signal.SIGSTOP)
            return None
        time.sleep(0.2)
        took, error = timed(lambda: coordinator.round("save"))
        if is_rank(2):
            time.sleep(1.0)
            os.kill(int(pids.item()), signal.SIGCONT)
        assert isinstance(error, RankTimeout), repr(error)
        return took, str(error), error.ranks


@pytest.mark.slow
def test_a_frozen_rank_0_holds_nobody_past_the_deadline(ranks: RankPool) -> None:
    _, *others = ranks.run(3, freeze_rank_0)
    for took, message, missing in others:
        assert missing == [0], message
        assert took < 1.0 + SLACK
