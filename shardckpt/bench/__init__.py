# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: the engine, torch.distributed.checkpoint (DCP) and the raw disk, side by side on one state.

`measure_save`, `measure_load` and `measure_reshard` start rank processes of their own (gloo, on CPU), give them a GPT-shaped
FSDP2 model with Adam's state, and let the contestants take turns, so that a change of the machine's mood meets all of them.
What was saved and loaded is compared bit by bit, outside of the time that is measured. `measure_async` trains that model, and
measures what saves beside it cost. `measure_deepspeed` trains nothing, and lets DeepSpeed take
its turns with its own engines. `measure_restart` kills a process of a job, and times what comes until it trains again.
`measure_planning` does the work of rank 0 of a job of any size in one process.
"""

from __future__ import annotations

from .async_report import AsyncReport
from .deepspeed import measure_deepspeed
from .deepspeed_report import EngineReport
from .launch import BenchmarkFailed, Progress
from .measure import measure_async, measure_load, measure_reshard, measure_save
from .planning import PlanReport, measure_planning
from .report import Report
from .restart import RestartReport, measure_restart
from .shapes import parse_size
from .spec import AsyncSpec, DeepSpeedSpec, LoadSpec, PlanSpec, ReshardSpec, RestartSpec, SaveSpec

__all__ = [
    "AsyncReport",
    "AsyncSpec",
    "BenchmarkFailed",
    "DeepSpeedSpec",
    "EngineReport",
    "LoadSpec",
    "PlanReport",
    "PlanSpec",
    "Progress",
    "Report",
    "ReshardSpec",
    "RestartReport",
    "RestartSpec",
    "SaveSpec",
    "measure_async",
    "measure_deepspeed",
    "measure_load",
    "measure_planning",
    "measure_reshard",
    "measure_restart",
    "measure_save",
    "parse_size",
]
