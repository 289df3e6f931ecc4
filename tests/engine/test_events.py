# SPDX-License-Identifier: Apache-2.0
"""Phases: what counts as time, what the callback hears, and that it cannot hurt the engine."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, get_args

import msgspec
import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt.coordinate import Coordinator
from shardckpt.errors import ChecksumMismatch, ConfigError
from shardckpt.events import PHASES, Event, Phase, Sink, Timings
from shardckpt.loading import Load
from shardckpt.manifest import MANIFEST_NAME, step_directory
from shardckpt.metrics import RECORDED, decode_columns
from shardckpt.options import Options
from shardckpt.store import open_store
from shardckpt.targets import Selection
from shardckpt.validate import parse_manifest
from tests.maintain.make import flip, rank_file, spread
from tests.ranks import RankPool


class Clock:
    """Stands still unless it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# ---- adding up


def test_phases_are_in_the_order_in_which_they_begin() -> None:
    assert get_args(Phase) == PHASES
    timings = Timings()
    for phase in reversed(PHASES):
        timings.add(phase, 1.0)
    assert tuple(timings.seconds) == tuple(timings.bytes) == tuple(timings.snapshot()) == PHASES


def test_times_and_bytes_add_up() -> None:
    clock = Clock()
    timings = Timings(clock)
    timings.add("write", 1.0, 10)
    with timings.measure("write", 5):
        clock.now += 2
    with timings.measure("plan"):
        clock.now += 0.5
    assert timings.seconds == {"plan": 0.5, "write": 3.0}
    assert timings.bytes == {"plan": 0, "write": 15}
    assert str(timings) == "plan 0.50 s, write 3.00 s"


def test_a_decorated_function_counts_at_each_call() -> None:
    clock = Clock()
    timings = Timings(clock)

    @timings.measure("plan")
    def work(seconds: float) -> float:
        clock.now += seconds
        return seconds

    assert work(1) + work(2) == timings.seconds["plan"] == 3


def test_a_block_that_raises_counts() -> None:
    clock = Clock()
    timings = Timings(clock)
    with pytest.raises(ValueError, match="no"), timings.measure("read", 7):
        clock.now += 1
        raise ValueError("no")
    assert timings.snapshot() == {"read": (1.0, 7)}


def test_a_moment_counts_once_however_many_threads_are_at_it() -> None:
    """One thread measures from 0 to 3, another from 1 to 5, and then one from 7 to 8: six seconds and all bytes."""
    clock = Clock()
    timings = Timings(clock)
    first, second, third = (timings.measure("hash", nbytes) for nbytes in (1, 2, 4))
    clock.now = 0
    first.__enter__()
    clock.now = 1
    second.__enter__()
    clock.now = 3
    first.__exit__(None, None, None)
    assert timings.seconds == {"hash": 0.0}
    clock.now = 5
    second.__exit__(None, None, None)
    clock.now = 7
    with third:
        clock.now = 8
    assert timings.snapshot() == {"hash": (6.0, 7)}


def test_no_addition_of_a_thread_is_lost() -> None:
    timings = Timings()
    together = threading.Barrier(8)

    def work(_: int) -> None:
        together.wait()
        for _ in range(500):
            timings.add("stage", 1.0, 1)
            with timings.measure("write", 1):
                pass

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert timings.snapshot()["stage"] == (4000.0, 4000)
    assert timings.bytes["write"] == 4000


def test_what_another_process_measured_is_added() -> None:
    there, here = Timings(), Timings()
    there.add("write", 2.0, 20)
    there.add("fsync", 1.0)
    here.add("stage", 0.5, 20)
    here.add("fsync", 0.25)
    message = msgspec.msgpack.encode(there.snapshot())
    here.merge(msgspec.msgpack.decode(message, type=dict[Phase, tuple[float, int]]))
    assert here.snapshot() == {"stage": (0.5, 20), "write": (2.0, 20), "fsync": (1.25, 0)}


# ---- the callback


def some_timings() -> Timings:
    timings = Timings()
    timings.add("write", 2.0, 20)
    timings.add("capture", 1.0)
    return timings


def test_the_callback_hears_of_each_phase_in_order() -> None:
    events: list[Event] = []
    Sink(events.append).report("save", 7, 3, some_timings())
    assert events == [Event("save", "capture", 7, 3, 1.0, 0), Event("save", "write", 7, 3, 2.0, 20)]


def test_no_callback_costs_nothing() -> None:
    """Not even the totals are put together."""

    class Untouched(Timings):
        snapshot: Callable[[], dict[Phase, tuple[float, int]]] = None  # type: ignore[assignment]

    Sink().report("save", 0, 0, Untouched())


def test_a_callback_has_to_be_one() -> None:
    with pytest.raises(ConfigError, match=r"on_event='print' cannot be called; pass a function of one Event"):
        Sink("print")  # type: ignore[arg-type]


def test_what_the_callback_raises_is_logged_once_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[Event] = []

    def fails(event: Event) -> None:
        heard.append(event)
        raise ZeroDivisionError("of the user's own making")

    sink = Sink(fails)
    with caplog.at_level(logging.ERROR, logger="shardckpt"):
        for _ in range(3):
            sink.report("load", 7, 3, some_timings())
    assert len(heard) == 6
    (record,) = caplog.records
    assert "on_event raised at Event(operation='load', phase='capture', step=7" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


def test_ctrl_c_in_the_callback_is_not_swallowed() -> None:
    def interrupted(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sink(interrupted).report("save", 0, 0, some_timings())


# ---- saves


def by_phase(events: list[Event]) -> dict[Phase, Event]:
    found = {event.phase: event for event in events}
    assert len(found) == len(events)
    return found


def check_recorded(path: Path, by_rank: list[dict[Phase, Event]]) -> None:
    """The manifest has of each rank what its callback heard."""
    metrics = parse_manifest((path / MANIFEST_NAME).read_bytes()).manifest.metrics
    assert metrics is not None
    columns = decode_columns(metrics, len(by_rank))
    assert list(columns) == [phase for phase in RECORDED if phase in by_rank[0]]
    for phase, column in columns.items():
        told = by_rank[:1] if phase == "receipts" else by_rank
        assert column.tolist() == pytest.approx([events[phase].seconds for events in told], abs=1e-6)


def test_a_save_tells_what_it_did(tmp_path: Path) -> None:
    events: list[Event] = []
    saved = shardckpt.save(tmp_path, {"x": torch.arange(1000.0)}, step=4, on_event=events.append)
    found = by_phase(events)
    assert list(found) == ["capture", "exchange", "plan", "hash", "write", "fsync", "receipts", "commit"]
    assert {(event.operation, event.step, event.rank) for event in events} == {("save", 4, 0)}
    assert found["hash"].bytes == found["write"].bytes == saved.bytes == 4000
    assert all(0 < event.seconds <= saved.seconds for event in events)
    check_recorded(tmp_path, [found])


@pytest.mark.parametrize(
    ("stage", "background"),
    [("eager", "thread"), ("lazy", "thread"), ("none", "thread"), ("eager", "process"), ("lazy", "process")],
)
def test_a_save_in_the_background_tells_what_it_did(
    tmp_path: Path, stage: Literal["eager", "lazy", "none"], background: Literal["thread", "process"]
) -> None:
    events: list[Event] = []
    state = {"x": torch.arange(1000.0)}
    options = Options(stage=stage, background=background)
    with shardckpt.Checkpointer(tmp_path, on_event=events.append, options=options) as checkpointer:
        checkpointer.save(4, state)
        checkpointer.wait()
        found = by_phase(events)
        staged = [] if stage == "none" else ["stage"]
        assert list(found) == ["capture", "exchange", "plan", *staged, "hash", "write", "fsync", "receipts", "commit"]
        assert {event.bytes for phase, event in found.items() if phase in ("stage", "hash", "write")} == {4000}
        check_recorded(tmp_path / step_directory(4), [found])
        events.clear()
        checkpointer.restore(state)
    assert {(event.operation, event.step) for event in events} == {("load", 4)}


def test_a_callback_that_raises_does_no_harm_to_saves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fails(event: Event) -> None:
        raise LookupError("no such thing")

    with shardckpt.Checkpointer(tmp_path, on_event=fails) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"x": torch.arange(10.0)}).result(60)
        assert checkpointer.steps() == [1, 2]
    assert len([record for record in caplog.records if "on_event raised" in record.getMessage()]) == 1


def save_rows(url: str) -> list[Event]:
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(64 * 32.0).view(64, 32)
    state = {"x": dist.tensor.distribute_tensor(whole, mesh, [dist.tensor.Shard(0)])}
    events: list[Event] = []
    shardckpt.save(url, state, step=9, on_event=events.append)
    return events


def test_each_rank_tells_of_its_own_part_of_a_save(ranks: RankPool, tmp_path: Path) -> None:
    by_rank: list[list[Event]] = ranks.run(3, save_rows, str(tmp_path / "a"))
    assert [{event.rank for event in events} for events in by_rank] == [{0}, {1}, {2}]
    found = [by_phase(events) for events in by_rank]
    assert ["commit" in events for events in found] == [True, False, False]
    assert sum(events["write"].bytes for events in found) == 64 * 32 * 4
    check_recorded(tmp_path / "a", found)


# ---- loads


def test_a_load_tells_what_it_did(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shardckpt.save(tmp_path, {"x": torch.arange(1000.0), "y": torch.ones(3, 5).t()}, step=4)
    events: list[Event] = []
    with caplog.at_level(logging.INFO, logger="shardckpt"):
        restored = shardckpt.load(tmp_path, {"x": torch.zeros(1000), "y": torch.zeros(5, 3)}, on_event=events.append)
    found = by_phase(events)
    assert list(found) == ["plan", "read", "verify", "place"]
    assert {(event.operation, event.step, event.rank) for event in events} == {("load", 4, 0)}
    assert found["read"].bytes == found["verify"].bytes == restored.info.bytes_read == 4060
    assert found["place"].bytes == restored.info.bytes_needed == 4060
    assert all(0 < event.seconds <= restored.info.seconds for event in events)
    (line,) = [record.getMessage() for record in caplog.records if "loaded" in record.getMessage()]
    assert line.startswith(f"loaded {tmp_path}: 0.000 GB read in ")
    assert " GB/s (plan 0." in line


def test_a_callback_that_raises_does_no_harm_to_a_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fails(event: Event) -> None:
        raise LookupError("no such thing")

    shardckpt.save(tmp_path, {"x": torch.arange(10.0)})
    restored = shardckpt.load(tmp_path, on_event=fails)
    assert torch.equal(restored.state["x"], torch.arange(10.0))
    assert len([record for record in caplog.records if "on_event raised" in record.getMessage()]) == 1


def test_a_load_that_fails_tells_nothing(tmp_path: Path) -> None:
    shardckpt.save(tmp_path, {"x": torch.arange(10.0)})
    flip(rank_file(tmp_path), -1)
    events: list[Event] = []
    with pytest.raises(ChecksumMismatch):
        shardckpt.load(tmp_path, on_event=events.append)
    assert not events


def loaded_events(url: str, read_once: str) -> list[Event]:
    events: list[Event] = []
    with Coordinator.connect(timeout=60) as coordinator:
        selection, options = Selection(), Options(read_once=read_once)  # type: ignore[arg-type]
        target = {"x": spread(torch.zeros(64, 32), "columns")}
        Load(coordinator, open_store(url), "", selection, options, Sink(events.append)).run(target)
    return events


@pytest.mark.parametrize("read_once", ["always", "never"])
def test_each_rank_tells_of_its_own_part_of_a_load(ranks: RankPool, tmp_path: Path, read_once: str) -> None:
    ranks.run(4, save_rows, str(tmp_path / "a"))
    by_rank: list[list[Event]] = ranks.run(4, loaded_events, str(tmp_path / "a"), read_once)
    assert [{event.rank for event in events} for events in by_rank] == [{0}, {1}, {2}, {3}]
    assert {event.step for events in by_rank for event in events} == {9}
    found = [by_phase(events) for events in by_rank]
    assert ("exchange" in found[0]) is (read_once == "always")
    total = sum(events["read"].bytes for events in found)
    assert total == sum(events["verify"].bytes for events in found) == 64 * 32 * 4 * (1 if read_once == "always" else 4)
