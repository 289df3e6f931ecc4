# SPDX-License-Identifier: Apache-2.0
"""Helpers that pass events on to TensorBoard and Prometheus."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shardckpt import ConfigError, Event, PrometheusText, TensorBoardEvents

Labels = dict[str, str]


class Writer:
    """Has what helpers need of a SummaryWriter."""

    def __init__(self) -> None:
        self.points: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.points.append((tag, scalar_value, global_step))


def parsed(prometheus: PrometheusText) -> dict[str, tuple[str, list[tuple[Labels, float]]]]:
    """(type, samples) by name, as the official parser reads it."""
    found: dict[str, tuple[str, list[tuple[Labels, float]]]] = {}
    for family in text_string_to_metric_families(prometheus.text()):
        assert family.documentation
        for sample in family.samples:
            found.setdefault(sample.name, (family.type, []))[1].append((sample.labels, sample.value))
    return found


def test_curves_in_tensorboard() -> None:
    writer = Writer()
    record = TensorBoardEvents(writer)
    record(Event("save", "write", 100, 0, 2.0, 3 * 10**9))
    record(Event("save", "plan", 100, 0, 0.5, 0))
    TensorBoardEvents(writer, prefix="run/ckpt")(Event("load", "read", 7, 0, 0.0, 10))
    assert writer.points == [
        ("shardckpt/save/write_seconds", 2.0, 100),
        ("shardckpt/save/write_gb_per_s", 1.5, 100),
        ("shardckpt/save/plan_seconds", 0.5, 100),
        ("run/ckpt/load/read_seconds", 0.0, 7),
    ]


def test_text_for_prometheus() -> None:
    prometheus = PrometheusText()
    prometheus(Event("save", "write", 100, 3, 2.0, 3 * 10**9))
    prometheus(Event("save", "write", 200, 3, 1.5, 10**9))
    prometheus(Event("load", "read", 100, 3, 0.25, 7))
    write, read = (
        {"operation": operation, "phase": phase, "rank": "3"} for operation, phase in (("save", "write"), ("load", "read"))
    )
    assert parsed(prometheus) == {
        "shardckpt_phase_count_total": ("counter", [(read, 1), (write, 2)]),
        "shardckpt_phase_seconds_total": ("counter", [(read, 0.25), (write, 3.5)]),
        "shardckpt_phase_bytes_total": ("counter", [(read, 7), (write, 4e9)]),
        "shardckpt_phase_last_seconds": ("gauge", [(read, 0.25), (write, 1.5)]),
        "shardckpt_phase_last_step": ("gauge", [(read, 100), (write, 200)]),
    }


def test_text_for_prometheus_to_the_letter() -> None:
    prometheus = PrometheusText({"job": 'a "quoted"\\path\nof two lines'})
    prometheus(Event("save", "fsync", 1, 0, 0.5, 0))
    lines = prometheus.text().splitlines()
    assert lines[:3] == [
        "# HELP shardckpt_phase_count_total Times that this phase of saves or loads was completed.",
        "# TYPE shardckpt_phase_count_total counter",
        'shardckpt_phase_count_total{job="a \\"quoted\\"\\\\path\\nof two lines",operation="save",phase="fsync",rank="0"} 1',
    ]
    assert prometheus.text().endswith("\n")
    (sample,) = parsed(prometheus)["shardckpt_phase_last_step"][1]
    assert sample[0]["job"] == 'a "quoted"\\path\nof two lines'


def test_nothing_has_happened_yet() -> None:
    assert parsed(PrometheusText()) == {}


@pytest.mark.parametrize("name", ["", "7", "a-b", "a b", "__internal", "é", "rank", "phase", "operation", "a\n"])
def test_labels_that_prometheus_does_not_take(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a label"):
        PrometheusText({name: "x"})


def test_counters_are_fed_by_many_threads() -> None:
    prometheus = PrometheusText({"_job": "x"})
    with ThreadPoolExecutor(8) as threads:
        for _ in range(800):
            threads.submit(prometheus, Event("save", "write", 1, 0, 1.0, 1))
            threads.submit(prometheus.text)
    ((_, count),) = parsed(prometheus)["shardckpt_phase_count_total"][1]
    assert count == 800
