# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of `bench async`, on turns that are made up."""

from __future__ import annotations

import pytest

from shardckpt import Options
from shardckpt.bench.async_contest import AsyncOutcome, Cycle, Turn
from shardckpt.bench.async_contestants import Engine, Entrant, Nobody
from shardckpt.bench.async_report import AsyncLine, AsyncReport, summarize_async
from shardckpt.bench.machine import describe_machine
from shardckpt.bench.report import describe_workload
from shardckpt.bench.spec import AsyncSpec

pytest.importorskip("shardckpt.bench.async_peers", reason="DCP of this torch has no stagers", exc_type=ImportError)
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from shardckpt.bench.async_peers import Peer

MIB = 1 << 20
FIRST = Cycle(stall=9.0, call=9.0, durable=9.0, steps=(9.0,))
ENTRANTS: list[Entrant] = [
    Nobody(),
    Engine(name="ours-blocking", options=Options(), wait=True),
    Engine(name="ours-eager", options=Options(stage="eager")),
    Engine(name="ours-lazy", options=Options(stage="lazy")),
    Peer(name="dcp-thread", writer=AsyncCheckpointerType.THREAD),
]


def summarize(*turns: Turn) -> AsyncReport:
    outcome = AsyncOutcome(nbytes=200 * MIB, shard=100 * MIB, num_tensors=7, turns=list(turns))
    outcome.copies = {"torch": [0.3, 0.1, 0.2], "numpy": [0.2, 0.3, 0.4]}
    workload = describe_workload(AsyncSpec(), outcome.nbytes, outcome.num_tensors)
    return summarize_async(outcome, ENTRANTS, describe_machine("."), workload, "cpu")


def turn(contestant: str, *cycles: Cycle, memory: int = 0) -> Turn:
    return Turn(contestant=contestant, alone=(1.0, 0.9, 1.1), cycles=[FIRST, *cycles], memory=memory, checked=2)


def all_turns(*more: Turn) -> dict[str, AsyncLine]:
    report = summarize(
        turn("no-checkpoints", Cycle(stall=0.0, call=0.0, durable=0.0, steps=(1.0, 1.5)), memory=3 * MIB),
        turn("ours-blocking", Cycle(stall=4.0, call=4.0, durable=4.0, steps=(5.0, 1.0))),
        # two steps meet the save; of 2.5 s, 0.5 s are a stall and 1 s is lost besides
        turn("ours-eager", Cycle(stall=0.5, call=0.5, durable=2.5, steps=(2.0, 1.5, 1.0, 1.0)), memory=110 * MIB),
        # the last step before it is durable counts in full
        turn("ours-lazy", Cycle(stall=0.1, call=0.05, durable=2.1, steps=(1.5, 1.1, 1.0)), memory=130 * MIB),
        turn("dcp-thread", Cycle(stall=1.0, call=1.0, durable=5.0, steps=(3.0, 2.0, 1.0, 1.0)), memory=300 * MIB),
        *more,
    )
    assert (report.copy_s, report.copied_by) == (0.2, "torch")
    return {line.contestant: line for line in report.results}


def test_stall_loss_and_ratios() -> None:
    lines = all_turns()
    eager = lines["ours-eager"]
    assert (eager.stall_s, eager.stall_max_s, eager.call_s, eager.first_stall_s) == (0.5, 0.5, 0.5, 9.0)
    assert eager.times_copy == pytest.approx(2.5)
    assert eager.lost_s == pytest.approx(1.5)
    assert eager.loss == pytest.approx(0.5)
    assert eager.steps_per_s == pytest.approx(1.0)
    assert eager.steps_per_s_in_flight == pytest.approx(0.5)
    assert eager.durable_s == 2.5
    assert eager.times_blocking == pytest.approx(0.625)
    assert eager.memory_bytes == 110 * MIB
    assert eager.times_shard == pytest.approx(1.1)
    lazy = lines["ours-lazy"]
    assert (lazy.stall_s, lazy.call_s) == (0.1, 0.05)
    assert lazy.loss == pytest.approx((2.6 - 2.0 - 0.1) / 2.0)


def test_those_that_do_not_fly_have_no_loss() -> None:
    lines = all_turns()
    assert lines["ours-blocking"].loss is None
    assert lines["ours-blocking"].lost_s == pytest.approx(4.0)
    assert lines["dcp-thread"].times_blocking is None
    assert lines["no-checkpoints"].loss == pytest.approx(0.2)
    assert (lines["no-checkpoints"].stall_s, lines["no-checkpoints"].memory_bytes) == (None, 3 * MIB)


def test_a_save_that_held_training_until_it_was_durable_tells_nothing_of_its_flight() -> None:
    held = Cycle(stall=2.0, call=0.1, durable=2.0, steps=(2.5, 1.0))
    assert all_turns(turn("ours-eager", held, held))["ours-eager"].loss == pytest.approx(0.5)


def test_medians_are_those_of_all_turns_that_ended() -> None:
    failed = Turn(contestant="ours-eager", alone=(1.0,), cycles=[FIRST], problem="no luck")
    calm = Cycle(stall=0.1, call=0.1, durable=1.1, steps=(1.1, 1.0))
    eager = all_turns(turn("ours-eager", calm, calm, memory=120 * MIB), failed)["ours-eager"]
    assert eager.stalls == (0.5, 0.1, 0.1)
    assert (eager.stall_s, eager.stall_max_s, eager.durable_s) == (0.1, 0.5, 1.1)
    assert eager.memory_bytes == 115 * MIB
    assert (eager.problem, eager.checked) == ("no luck", 4)


def test_whoever_never_ended_has_only_a_problem() -> None:
    failed = Turn(contestant="dcp-thread", alone=(1.0,), problem="no luck")
    report = summarize(failed, *(turn(entrant.name, FIRST) for entrant in ENTRANTS[:4]))
    assert report.results[-1].problem == "no luck"
    assert report.results[-1].stall_s is None


def test_bars_are_told_with_what_was_found() -> None:
    report = summarize(
        turn("no-checkpoints", Cycle(stall=0.0, call=0.0, durable=0.0, steps=(1.0,))),
        turn("ours-blocking", Cycle(stall=2.0, call=2.0, durable=2.0, steps=(3.0,))),
        turn("ours-eager", Cycle(stall=0.2, call=0.2, durable=2.2, steps=(1.2, 1.2, 1.0)), memory=164 * MIB),
        turn("ours-lazy", Cycle(stall=0.1, call=0.1, durable=2.1, steps=(1.2, 1.1, 1.0)), memory=100 * MIB),
        turn("dcp-thread", Cycle(stall=1.0, call=1.0, durable=3.0, steps=(2.5, 1.5, 1.0))),
    )
    found = {(bar.contestant, bar.name): [bar.found, bar.at_most] for bar in report.bars}
    expected = {
        ("ours-eager", "stall / plain copy"): (1.0, 1.25),
        ("ours-eager", "stall / least of DCP's that copy in the call"): (0.2, 0.5),
        ("ours-eager", "loss in flight / least of DCP's"): (0.1 / 0.5, 2 / 3),
        ("ours-eager", "lost in all / least of DCP's"): (0.4 / 2.0, None),
        ("ours-eager", "time until durable / blocking save"): (1.1, 1.3),
        ("ours-eager", "MiB of memory beyond the shard"): (64.0, 64.0),
        ("ours-lazy", "stall / eager stall"): (0.5, 0.3),
        ("ours-lazy", "loss in flight / least of DCP's"): (0.1 / 0.5, 2 / 3),
        ("ours-lazy", "lost in all / least of DCP's"): (0.3 / 2.0, None),
        ("ours-lazy", "time until durable / blocking save"): (1.05, 1.3),
        ("ours-lazy", "MiB of memory beyond the shard"): (0.0, 64.0),
    }
    assert found.keys() == expected.keys()
    for key, (value, bar) in expected.items():
        assert found[key] == pytest.approx([value, bar]), key
