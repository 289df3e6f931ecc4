# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of `bench deepspeed`, on turns that are made up; and what it says where DeepSpeed is not installed."""

from __future__ import annotations

import pytest

from shardckpt import ConfigError
from shardckpt.bench import DeepSpeedSpec
from shardckpt.bench.deepspeed_contest import FLUSHED, OURS, THEIRS, EngineOutcome, EngineTurn
from shardckpt.bench.deepspeed_report import Conversion, compare, lines_of_conversions, lines_of_loads, lines_of_saves
from shardckpt.bench.deepspeed_workload import require_deepspeed


def outcome(*turns: EngineTurn) -> EngineOutcome:
    return EngineOutcome(parameters=10, nbytes=1000, turns=list(turns))


def saves(ours: float) -> EngineOutcome:
    return outcome(
        *(EngineTurn(OURS, seconds) for seconds in (9.0, ours, 0.1)),
        *(EngineTurn(THEIRS, seconds) for seconds in (2.0, 2.0, 7.0)),
        *(EngineTurn(FLUSHED, seconds) for seconds in (4.0, 4.0, 8.0)),
    )


def loads(ours: int, theirs: int) -> EngineOutcome:
    return outcome(
        *(EngineTurn(OURS, seconds, ours) for seconds in (1.0, 3.0, 1.25)),
        *(EngineTurn(THEIRS, seconds, theirs, ("embed (3 elements)",)) for seconds in (2.0, 2.0, 5.0)),
    )


def test_medians_become_figures_beside_their_bars() -> None:
    lines = [line for stage in (1, 2, 3) for line in lines_of_saves(stage, saves(stage / 2))]
    lines += [*lines_of_loads(4, loads(1020, 5000)), *lines_of_loads(2, loads(1100, 2500))]
    lines += lines_of_conversions(
        [
            *(Conversion(OURS, 2.0, memory, 0.75) for memory in (400_000_000, 300_000_000, 900_000_000)),
            *(Conversion(THEIRS, 10.0, 1_850_000_000, disk) for disk in (2.0, 2.25, 2.1)),
        ]
    )
    assert [(bar.name, bar.contestant, bar.found, bar.at_most) for bar in compare(lines, 4, 2)] == [
        ("s to resume at stage 3, 4 to 2 ranks", OURS, 1.25, 1.5),
        ("s to resume at stage 3, 4 to 2 ranks", f"{THEIRS}, converted first", 12.0, None),
        ("bytes read per rank / ideal, 4 ranks", OURS, 1.02, 1.05),
        ("bytes read per rank / ideal, 4 ranks", THEIRS, 5.0, None),
        ("bytes read per rank / ideal, 2 ranks", OURS, 1.1, 1.05),
        ("bytes read per rank / ideal, 2 ranks", THEIRS, 2.5, None),
        ("durable save / DeepSpeed's, stage 1", OURS, 0.25, 0.6),
        ("durable save / DeepSpeed + fsync, stage 1", OURS, 0.125, None),
        ("durable save / DeepSpeed's, stage 2", OURS, 0.5, 0.6),
        ("durable save / DeepSpeed + fsync, stage 2", OURS, 0.25, None),
        ("durable save / DeepSpeed's, stage 3", OURS, 0.75, 0.6),
        ("durable save / DeepSpeed + fsync, stage 3", OURS, 0.375, None),
        ("import: GB of memory", OURS, 0.4, 0.5),
        ("import: extra disk / source", OURS, 0.75, 1.0),
        ("ds_to_universal: GB of memory", THEIRS, 1.85, None),
        ("ds_to_universal: extra disk / source", THEIRS, 2.25, None),
    ]
    wrong = {line.who: line.wrong for line in lines if line.what == "load on 2"}
    assert wrong == {OURS: (), THEIRS: ("embed (3 elements)",)}


def test_without_deepspeed_the_remedy_is_named() -> None:
    with pytest.raises(ConfigError, match=r"DeepSpeed is not installed.* DS_BUILD_OPS=0 pip install --no-build-isolation"):
        require_deepspeed(lambda name: None)


def test_bad_values_are_refused() -> None:
    assert DeepSpeedSpec().nbytes // 12 == 101_000_000
    with pytest.raises(ConfigError, match="to_ranks=0 is not an int of at least 1"):
        DeepSpeedSpec(to_ranks=0)
