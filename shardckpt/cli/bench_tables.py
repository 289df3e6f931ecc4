# SPDX-License-Identifier: Apache-2.0
"""Reports of benchmarks as tables on stdout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .output import count_text, print_json, print_table, say, size_text

if TYPE_CHECKING:
    # torch, which these import, takes seconds: only commands that measure pay for it
    from shardckpt.bench import AsyncReport, EngineReport, PlanReport, Report, RestartReport
    from shardckpt.bench.async_report import AsyncLine, Bar
    from shardckpt.bench.deepspeed_report import EngineLine
    from shardckpt.bench.report import Line


def print_report(report: Report, as_json: bool) -> None:
    """What saves or loads took."""
    if as_json:
        print_json(report)
        return
    facts = report.workload
    say(
        f"bench {report.benchmark}: {size_text(facts.bytes)} saved by {count_text(facts.ranks, 'rank')}: "
        f"{facts.parameters / 1e6:.1f} M parameters and Adam's moments in {facts.tensors} tensors; "
        f"{count_text(facts.rounds, 'round')}"
    )
    numbers = ("median s", "min", "max", "GB/s", "x DCP", "of raw", "read")
    print_table(("ranks", "dim", "cache", "who", *numbers), [_cells(line) for line in report.results], numbers=numbers)
    for what, way in report.raw_ways.items():
        say(f"raw {what.replace('_', ' ')}: {way} (the fastest of those that were tried)")
    say(f"cold: files were taken out of the page cache by {report.cold_by}")
    say(str(report.machine))


def _cells(line: Line) -> tuple[str, ...]:
    case = line.case
    same = case.from_ranks == case.to_ranks
    return (
        str(case.to_ranks) if same else f"{case.from_ranks} to {case.to_ranks}",
        str(case.dim),
        line.cache,
        line.contestant,
        f"{line.median_s:.3f}",
        f"{line.min_s:.3f}",
        f"{line.max_s:.3f}",
        f"{line.gb_per_s:.2f}",
        f"{line.times_dcp:.2f}",
        f"{line.of_raw:.2f}",
        f"{line.read_amplification:.3f}x" if line.read_amplification is not None else "",
    )


def print_async(report: AsyncReport) -> None:
    """What saves cost training."""
    facts = report.workload
    say(
        f"bench async: {size_text(facts.bytes)} saved by {count_text(facts.ranks, 'rank')} that train on {report.device}: "
        f"{facts.parameters / 1e6:.1f} M parameters and Adam's moments in {facts.tensors} tensors; "
        f"{count_text(facts.rounds, 'round')}"
    )
    numbers = (
        *("stall s", "max", "x copy", "steps/s", "in flight", "loss", "lost s", "durable s", "x blocking"),
        *("memory", "x shard", "verified"),
    )
    print_table(("who", *numbers), [_async_cells(line) for line in report.results], numbers=numbers)
    for line in report.results:
        for wrong in line.wrong:
            say(f"{line.contestant} WRONG: {wrong}")
        if line.problem:
            say(f"{line.contestant} FAILED: {line.problem}")
    say(
        f"plain copy: {report.copy_s:.4f} s for {size_text(report.shard_bytes)} on each of {count_text(facts.ranks, 'rank')} "
        f"at once, by {report.copied_by}"
    )
    _print_bars(report.bars)
    say(str(report.machine))


def _print_bars(bars: Sequence[Bar]) -> None:
    if bars:
        say()
        rows = [(bar.contestant, bar.name, _cell(bar.found, ".2f"), _cell(bar.at_most, ".2f")) for bar in bars]
        print_table(("who", "figure", "found", "at most"), rows, numbers=("found", "at most"))


def _async_cells(line: AsyncLine) -> tuple[str, ...]:
    return (
        line.contestant,
        _cell(line.stall_s, ".4f"),
        _cell(line.stall_max_s, ".4f"),
        _cell(line.times_copy, ".2f"),
        _cell(line.steps_per_s, ".2f"),
        _cell(line.steps_per_s_in_flight, ".2f"),
        _cell(line.loss, ".1%"),
        _cell(line.lost_s, ".3f"),
        _cell(line.durable_s, ".3f"),
        _cell(line.times_blocking, ".2f"),
        "" if line.memory_bytes is None else f"{line.memory_bytes / 1e6:.0f} MB",
        _cell(line.times_shard, ".2f"),
        f"{line.checked - len(line.wrong)} of {line.checked}" if line.checked else "",
    )


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def print_deepspeed(report: EngineReport) -> None:
    """What DeepSpeed's engines took, with shardckpt and without."""
    say(
        f"bench deepspeed: {size_text(report.bytes)} of masters and moments of {report.parameters / 1e6:.1f} M parameters, "
        f"saved by {count_text(report.ranks, 'rank')}, resumed by {report.to_ranks}; {count_text(report.rounds, 'round')}; "
        f"DeepSpeed {report.deepspeed}"
    )
    numbers = ("median s", "min", "max", "read per rank", "x ideal", "memory", "disk")
    print_table(("task", "who", *numbers), [_engine_cells(line) for line in report.results], numbers=numbers)
    for line in report.results:
        if line.wrong:
            say(f"{line.who} WRONG after {line.what}: {'; '.join(line.wrong[:4])}")
    _print_bars(report.bars)
    say(str(report.machine))


def _engine_cells(line: EngineLine) -> tuple[str, ...]:
    return (
        line.what,
        line.who,
        f"{line.median_s:.3f}",
        f"{min(line.seconds):.3f}",
        f"{max(line.seconds):.3f}",
        "" if line.read_bytes is None else size_text(line.read_bytes),
        _cell(line.times_ideal, ".3f"),
        "" if line.memory_bytes is None else size_text(line.memory_bytes),
        _cell(line.extra_disk, ".2f"),
    )


def print_restart(report: RestartReport) -> None:
    """What restarts took."""
    say(
        f"bench restart: {size_text(report.bytes)} on {count_text(report.ranks, 'rank')}, of which one is killed; "
        f"{count_text(report.rounds, 'round')}"
    )
    numbers = ("joined s", "restored s", "first step s", "min", "max")
    rows = [
        (
            line.who,
            f"{line.joined_s:.2f}",
            _cell(line.restored_s, ".2f"),
            f"{line.median_s:.2f}",
            f"{min(line.seconds):.2f}",
            f"{max(line.seconds):.2f}",
        )
        for line in report.results
    ]
    print_table(("who", *numbers), rows, numbers=numbers)
    _print_bars(report.bars)
    say(str(report.machine))


def print_planning(report: PlanReport) -> None:
    """What planning took."""
    say(
        f"bench plan: {report.model} ({report.parameters / 1e9:.1f} G parameters) and Adam's moments in {report.tensors} "
        f"tensors, on {count_text(report.ranks, 'rank')}; {count_text(len(report.steps[0].seconds), 'round')}"
    )
    print_table(("step", "median s"), [(s.name, f"{s.median_s:.4f}") for s in report.steps], numbers=("median s",))
    say()
    loads = [
        (
            f"{load.ranks:,}",
            f"{load.seconds:.4f}",
            str(load.files),
            size_text(load.bytes_needed),
            f"{load.bytes_read / load.bytes_needed:.3f}x",
        )
        for load in report.loads
    ]
    headers = ("ranks that load", "median s to plan on one", "files", "needed", "reads alone")
    print_table(headers, loads, numbers=headers)
    say()
    found = {"planning_s": report.planning_s, "manifest_bytes": report.manifest_bytes, "reading_back_s": report.reading_back_s}
    bars = {bar.name: f"{_number(bar.bar)}, {'met' if bar.met else 'MISSED'}" for bar in report.bars}
    rows = [(name, _number(value), bars.get(name, "")) for name, value in found.items()]
    print_table(("shardckpt", "found", "at most"), rows, numbers=("found",))
    if report.peer is not None:
        peer = report.peer
        say(
            f"DCP on {count_text(peer.ranks, 'rank')}: planning {peer.planning_s:.2f} s, {peer.metadata_bytes:,} bytes of "
            f"metadata, reading them back {peer.reading_back_s:.2f} s; one rank plans a save in {peer.one_rank_save_s:.2f} s "
            f"and a load in {peer.one_rank_load_s:.2f} s"
        )
    say(str(report.machine))


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
