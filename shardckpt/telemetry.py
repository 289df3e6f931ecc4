# SPDX-License-Identifier: Apache-2.0
"""Callbacks for ``on_event`` that pass events on to the monitoring that people have: TensorBoard and Prometheus."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from typing import Protocol

from .errors import ConfigError
from .events import Event


class ScalarWriter(Protocol):
    """What `TensorBoardEvents` needs of a ``SummaryWriter``, of torch, tensorboardX or one's own."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> object:
        """Add one point to the curve ``tag``."""


class TensorBoardEvents:
    """An ``on_event`` that draws curves, such as ``shardckpt/save/write_seconds`` and ``shardckpt/save/write_gb_per_s``.

    ``writer`` is a ``torch.utils.tensorboard.SummaryWriter`` or anything with its ``add_scalar``. The curves tell of one rank:
    pass this on rank 0 only, or give each rank a writer with a directory of its own.
    """

    def __init__(self, writer: ScalarWriter, prefix: str = "shardckpt") -> None:
        self._writer = writer
        self._prefix = prefix

    def __call__(self, event: Event) -> None:
        """Add the points of one event, at its training step."""
        tag = f"{self._prefix}/{event.operation}/{event.phase}"
        self._writer.add_scalar(f"{tag}_seconds", event.seconds, event.step)
        if event.bytes and event.seconds:
            self._writer.add_scalar(f"{tag}_gb_per_s", event.bytes / 1e9 / event.seconds, event.step)


_FAMILIES = (
    ("shardckpt_phase_count_total", "counter", "Times that this phase of saves or loads was completed."),
    ("shardckpt_phase_seconds_total", "counter", "Wall time that was spent in this phase."),
    ("shardckpt_phase_bytes_total", "counter", "Bytes that went through this phase."),
    ("shardckpt_phase_last_seconds", "gauge", "Wall time of this phase in the last save or load."),
    ("shardckpt_phase_last_step", "gauge", "Training step of the last save or load that had this phase."),
)
_RESERVED = ("operation", "phase", "rank")


class PrometheusText:
    """An ``on_event`` that keeps counters and gauges by operation, phase and rank, for Prometheus to scrape.

    `text` is what to serve at ``/metrics``, or to write for the textfile collector of the node exporter. ``labels``, such as
    ``{"job": "llama-70b"}``, are added to every sample. Raises `ConfigError` for names of labels that Prometheus does not take.
    """

    def __init__(self, labels: Mapping[str, str] | None = None) -> None:
        for name in labels or {}:
            if not re.fullmatch(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*", name) or name in _RESERVED:
                raise ConfigError(
                    f"labels: {name!r} cannot be the name of a label: letters, digits and single leading underscores only, "
                    f"and not one of {', '.join(_RESERVED)}, which are set by the events"
                )
        self._labels = "".join(f'{name}="{_escape(str(value))}",' for name, value in (labels or {}).items())
        self._lock = threading.Lock()
        self._samples: dict[str, tuple[float, ...]] = {}

    def __call__(self, event: Event) -> None:
        """Count one event."""
        key = f'{self._labels}operation="{event.operation}",phase="{event.phase}",rank="{event.rank}"'
        with self._lock:
            count, seconds, nbytes, *_ = self._samples.get(key, (0, 0.0, 0))
            self._samples[key] = (count + 1, seconds + event.seconds, nbytes + event.bytes, event.seconds, event.step)

    def text(self) -> str:
        """All samples in the text exposition format, version 0.0.4 (``text/plain; version=0.0.4``)."""
        with self._lock:
            samples = sorted(self._samples.items())
        lines = []
        for at, (name, kind, meaning) in enumerate(_FAMILIES):
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{{{key}}} {values[at]!r}" for key, values in samples]
        return "\n".join(lines) + "\n"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
