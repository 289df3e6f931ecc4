# SPDX-License-Identifier: Apache-2.0
"""Signals are passed on once, and handled as before afterwards; the policy turns them into one last save."""

from __future__ import annotations

import dataclasses
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from shardckpt.appointment import Peers
from shardckpt.errors import ConfigError
from shardckpt.options import Schedule
from shardckpt.policy import SavePolicy
from shardckpt.preemption import Signals, check_signals

TERM, USR1, USR2 = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Tests leave signals as they find them."""
    before = {signum: signal.getsignal(signum) for signum in (TERM, USR1, USR2)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


# --- handlers


def test_the_first_signal_is_passed_on_and_the_others_change_nothing() -> None:
    told: list[int] = []
    signals = Signals(told.append)
    signals.install([TERM, USR1])
    for signum in (USR1, TERM, USR1):
        signal.raise_signal(signum)
    assert told == [USR1]
    signals.restore()


def test_what_handled_a_signal_before_does_so_afterwards() -> None:
    told: list[Any] = []
    signal.signal(USR1, lambda *_: told.append("before"))
    signal.signal(USR2, signal.SIG_IGN)
    signals = Signals(told.append)
    signals.install([USR1, USR2])
    signals.install([USR1])
    signal.raise_signal(USR1)
    signals.restore()
    signal.raise_signal(USR1)
    assert told == [USR1, "before"]
    assert signal.getsignal(USR2) == signal.SIG_IGN


def test_a_handler_that_was_set_since_then_stays() -> None:
    signals = Signals(lambda _: None)
    signals.install([USR1])
    signal.signal(USR1, signal.SIG_IGN)
    signals.restore()
    assert signal.getsignal(USR1) == signal.SIG_IGN


def test_after_a_close_in_another_thread_a_signal_does_what_it_did_before() -> None:
    told: list[Any] = []
    signal.signal(USR1, lambda *_: told.append("before"))
    signals = Signals(told.append)
    signals.install([USR1])
    thread = threading.Thread(target=signals.restore)
    thread.start()
    thread.join()
    signal.raise_signal(USR1)
    assert told == ["before"]


def test_a_forked_process_can_still_be_terminated() -> None:
    """In a process of its own, because this one has threads."""
    script = (
        "import os, signal, sys, time\n"
        "from shardckpt.preemption import Signals\n"
        "Signals(print).install([signal.SIGTERM])\n"
        "ready, begun = os.pipe()\n"
        "child = os.fork()\n"
        "if not child: os.write(begun, b'1'); time.sleep(60); os._exit(1)\n"
        "os.read(ready, 1)\n"
        "os.kill(child, signal.SIGTERM)\n"
        "sys.exit(os.waitpid(child, 0)[1])\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == TERM


def test_workers_of_data_loaders_die_of_their_parents_signals_only() -> None:
    """In a process of its own, which then ends with a worker that still lives."""
    script = (
        "import os, signal, subprocess\n"
        "from torch.utils.data import DataLoader\n"
        "from shardckpt.preemption import Signals\n"
        "signals = Signals(print)\n"
        "signals.install([signal.SIGTERM, signal.SIGUSR1])\n"
        "loaders = [DataLoader(list(range(50)), num_workers=1, persistent_workers=True) for _ in range(2)]\n"
        "batches = [iter(loader) for loader in loaders]\n"
        "first = [int(next(found)) for found in batches]\n"
        "workers = [found._workers[0] for found in batches]\n"
        "for name in ('TERM', 'USR1'):\n"
        "    subprocess.run(['sh', '-c', f'kill -{name} {workers[0].pid} {workers[1].pid}'], check=True)\n"
        "print(first, [sum(int(batch) for batch in found) for found in batches])\n"
        "workers[0].terminate()\n"
        "workers[0].join(30)\n"
        "print(workers[0].exitcode, workers[1].exitcode)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=90, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[0, 0] [1225, 1225]\n0 None\n"), done.stderr


@pytest.mark.parametrize(
    ("signals", "message"),
    [
        ((), r"on_signal needs at least one signal, such as signal\.SIGTERM"),
        ((1000,), "1000 is not a signal"),
        (("SIGTERM",), "'SIGTERM' is not a signal"),
        ((TERM, signal.SIGKILL), "no process can handle SIGKILL; SIGTERM is what asks a process to stop"),
        ((signal.SIGSTOP,), "no process can handle SIGSTOP"),
    ],
)
def test_refusals(signals: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_signals(signals)


def test_only_the_main_thread_may_handle_signals() -> None:
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(ConfigError, match="only the main thread handle signals: call on_signal there"),
    ):
        pool.submit(check_signals, (TERM,)).result()


# --- the policy of a single rank


@dataclasses.dataclass
class DoneSave:
    stall: float = 0.0
    error: Exception | None = None

    def done(self) -> bool:
        return True


@pytest.fixture
def make() -> Iterator[Callable[..., SavePolicy]]:
    made: list[SavePolicy] = []

    def make_policy(clock: Callable[[], float] = lambda: 0.0, **schedule: Any) -> SavePolicy:
        made.append(SavePolicy(Schedule(**schedule), Peers(), clock))
        return made[-1]

    yield make_policy
    for policy in made:
        policy.close()


def test_without_a_schedule_there_is_nothing_to_go_by(make: Callable[..., SavePolicy]) -> None:
    with pytest.raises(
        ConfigError, match=r"give the Checkpointer one of every_steps, .* and max_overhead, or call on_signal before"
    ):
        make().should_save(1)


def test_every_so_many_steps(make: Callable[..., SavePolicy]) -> None:
    policy = make(every_steps=4)
    assert [step for step in range(1, 14) if policy.should_save(step)] == [4, 8, 12]


def test_steps_or_seconds(make: Callable[..., SavePolicy]) -> None:
    now = 0.0
    policy = make(lambda: now, every_steps=10, every_seconds=4)
    saved = []
    for step in range(1, 24):
        now += 1.0
        if policy.should_save(step):
            saved.append(step)
            policy.saved(DoneSave())
    assert saved == [5, 9, 10, 14, 18, 20]


def test_a_signal_asks_for_one_save_and_then_ends_the_process(
    make: Callable[..., SavePolicy], caplog: pytest.LogCaptureFixture
) -> None:
    policy = make()
    policy.on_signal([TERM, USR1], None, True)
    assert not policy.should_save(1)
    policy.saved(DoneSave())
    for signum in (USR1, TERM, USR1):
        signal.raise_signal(signum)
    with caplog.at_level(logging.WARNING, "shardckpt"):
        assert policy.should_save(2)
    assert policy.preempted
    assert caplog.messages == [f"saving step 2: signal {int(USR1)} on rank 0"]
    with pytest.raises(SystemExit) as caught:
        policy.saved(DoneSave())
    assert caught.value.code == 128 + USR1
    assert not policy.should_save(3)


def test_a_process_that_leaves_is_deaf_to_further_signals(make: Callable[..., SavePolicy]) -> None:
    """Otherwise a launcher that stops the ranks that are slower to leave would change their exit status."""
    policy = make()
    policy.on_signal([USR1], 7, True)
    signal.raise_signal(USR1)
    assert policy.should_save(1)
    policy.close()
    signal.raise_signal(USR1)
    with pytest.raises(SystemExit) as caught:
        policy.saved(DoneSave())
    assert caught.value.code == 7


def test_the_user_may_leave_in_a_way_of_his_own(make: Callable[..., SavePolicy]) -> None:
    policy = make(every_steps=2)
    before = signal.getsignal(USR1)
    policy.on_signal([USR1], None, False)
    signal.raise_signal(USR1)
    assert [policy.should_save(step) for step in (1, 2, 3)] == [True, True, False]
    policy.saved(DoneSave())
    assert policy.preempted
    policy.close()
    assert signal.getsignal(USR1) == before


@pytest.mark.parametrize("status", [-1, 256, 1.0, False, "143"])
def test_exit_statuses_are_checked(make: Callable[..., SavePolicy], status: Any) -> None:
    with pytest.raises(ConfigError, match=r"is not an int from 0 to 255 \(or None, for 128 \+ the signal's number\)"):
        make().on_signal([TERM], status, True)
    assert signal.getsignal(TERM) == signal.SIG_DFL


def test_an_exit_status_without_leaving_is_refused(make: Callable[..., SavePolicy]) -> None:
    with pytest.raises(ConfigError, match="exit_status=3 has no effect with leave=False"):
        make().on_signal([TERM], 3, False)
