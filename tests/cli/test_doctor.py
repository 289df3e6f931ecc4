# SPDX-License-Identifier: Apache-2.0
"""How ``shardckpt doctor`` ends when it is told to, and what it prints of GPUs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from shardckpt.cli.doctor import report, unwound_by_signals
from shardckpt.doctor import Diagnosis
from shardckpt.gpu import GPU
from shardckpt.store import LocalStore
from shardckpt.store.filesystem import FileSystem
from shardckpt.store.trial import measure_speed


class Interrupted(FileSystem):
    """Sends this process a signal at the first flush."""

    def __init__(self, number: int) -> None:
        self._number = number

    def fsync(self, fd: int) -> None:
        os.kill(os.getpid(), self._number)
        super().fsync(fd)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_a_trial_has_written_goes_when_it_is_told_to_end(tmp_path: Path, number: int) -> None:
    with pytest.raises(SystemExit) as end, unwound_by_signals():
        measure_speed(LocalStore(tmp_path, Interrupted(number)), 2 << 20)
    assert end.value.code == 128 + number
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) == signal.SIG_DFL


def test_signals_that_are_ignored_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with unwound_by_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def gpu(index: int | None, bus_id: str | None) -> GPU:
    return GPU(
        uuid="GPU-1",
        index=index,
        name="H100",
        bus_id=bus_id,
        numa_node=None,
        cpus=(),
        link=None,
        max_link=None,
        memory_total=None,
        memory_free=None,
        uncorrected_errors=None,
    )


def test_gpus_that_torch_may_not_use_are_told_apart_by_their_place(capsys: pytest.CaptureFixture[str]) -> None:
    known = (gpu(0, "00000000:1B:00.0"), gpu(None, "00000000:3B:00.0"), gpu(None, None))
    report(Diagnosis(known, ()), as_json=False)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[1:4]] == ["0", "00000000:3B:00.0", "-"]
