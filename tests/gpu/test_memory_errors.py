# SPDX-License-Identifier: Apache-2.0
"""A state that memory errors may have damaged is not saved, or only with a warning."""

from __future__ import annotations

import logging

import pynvml
import pytest
import torch

from shardckpt.coordinate import Coordinator
from shardckpt.errors import DeviceMemoryError, error_from_wire
from shardckpt.gpu import Nvml
from shardckpt.gpu.memory_errors import MemoryErrorGuard
from tests.gpu.driver import Card, Cuda, Driver
from tests.ranks import RankPool

A, B = "11111111-2222-3333-4444-555555555555", "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
GPU0, GPU1, CPU = torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")


class Machine:
    """Two GPUs, the first with errors from before, and a guard."""

    def __init__(self) -> None:
        self.a, self.b = Card(f"GPU-{A}", errors=3), Card(f"GPU-{B}")
        self.driver = Driver(self.a, self.b)
        self.guard = MemoryErrorGuard(Nvml(self.driver, numa_node=lambda bus_id: None), Cuda(A, B))

    def counts(self) -> list[tuple[str, int, int]]:
        return [(errors.gpu.uuid, errors.new, errors.count) for errors in self.guard.check()]


@pytest.fixture
def machine() -> Machine:
    machine = Machine()
    machine.guard.watch([GPU0, GPU1, CPU])
    return machine


def test_errors_from_before_do_not_count(machine: Machine) -> None:
    assert machine.counts() == []
    machine.guard.require_sound(0, "refuse", [GPU0, GPU1])


def test_errors_are_found_as_they_come(machine: Machine) -> None:
    machine.a.errors = 5
    assert machine.counts() == [(f"GPU-{A}", 2, 5)]
    machine.b.errors = 1
    machine.a.errors = 6
    assert machine.counts() == [(f"GPU-{A}", 3, 6), (f"GPU-{B}", 1, 1)]


def test_watching_again_changes_nothing(machine: Machine) -> None:
    machine.a.errors = 4
    machine.guard.watch([GPU0])
    assert machine.counts() == [(f"GPU-{A}", 1, 4)]


def test_a_counter_that_is_reset_hides_nothing(machine: Machine) -> None:
    machine.a.errors = 4
    assert machine.counts() == [(f"GPU-{A}", 1, 4)]
    machine.a.errors = 0
    assert machine.counts() == [(f"GPU-{A}", 1, 0)]
    machine.a.errors = 2
    assert machine.counts() == [(f"GPU-{A}", 3, 2)]


def test_a_driver_that_vanishes_hides_nothing_that_is_known(machine: Machine) -> None:
    machine.a.errors = 4
    assert machine.counts()
    machine.driver.gone = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    assert machine.counts() == [(f"GPU-{A}", 1, 4)]


def test_a_refusal_says_where_and_what_to_do(machine: Machine) -> None:
    machine.a.errors = 5
    with pytest.raises(DeviceMemoryError) as caught:
        machine.guard.require_sound(7, "refuse", [GPU0])
    for part in ("rank 7", "GPU 0", f"GPU-{A}", "0000:3b:00.0", "2 since", "5 since", "resume", "on_memory_errors='warn'"):
        assert part in caught.value.message
    assert caught.value.rank == 7
    assert caught.value.gpus == [{"uuid": f"GPU-{A}", "index": 0, "name": "NVIDIA H100 80GB HBM3", "count": 5, "new": 2}]
    rebuilt = error_from_wire("DeviceMemoryError", caught.value.message, caught.value.details)
    assert isinstance(rebuilt, DeviceMemoryError)
    assert rebuilt.gpus == caught.value.gpus


def test_a_refusal_stands_until_the_state_is_replaced(machine: Machine) -> None:
    machine.b.errors = 1
    for _ in range(2):
        with pytest.raises(DeviceMemoryError):
            machine.guard.require_sound(0, "refuse", [GPU0, GPU1])
    machine.guard.start_anew()
    machine.guard.require_sound(0, "refuse", [GPU0, GPU1])
    machine.b.errors = 2
    with pytest.raises(DeviceMemoryError, match="1 since the state was made or restored, 2 since"):
        machine.guard.require_sound(0, "refuse", [GPU0, GPU1])


def test_a_warning_comes_once_for_each_new_error(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    warned = []
    for errors in (3, 4, 4, 5, 5):
        machine.a.errors = errors
        machine.guard.require_sound(1, "warn", [GPU0])
        warned.append(len([record for record in caplog.records if record.levelno == logging.WARNING]))
    assert warned == [0, 1, 1, 2, 2]
    assert "rank 1 saves a state that may be damaged" in caplog.text


def test_the_current_device_is_watched_from_the_beginning_if_cuda_is_in_use() -> None:
    card = Card(f"GPU-{A}")
    nvml = Nvml(Driver(card), numa_node=lambda bus_id: None)
    used, unused = MemoryErrorGuard(nvml, Cuda(A, initialized=True)), MemoryErrorGuard(nvml, Cuda(A))
    card.errors = 1
    unused.require_sound(0, "refuse", [GPU0])
    with pytest.raises(DeviceMemoryError):
        used.require_sound(0, "refuse", [GPU0])


def test_other_devices_are_watched_from_when_they_are_first_seen() -> None:
    machine = Machine()
    machine.guard.require_sound(0, "refuse", [GPU0])
    machine.b.errors = 9
    machine.guard.require_sound(0, "refuse", [GPU0, GPU1])
    machine.b.errors = 10
    with pytest.raises(DeviceMemoryError, match="GPU 1"):
        machine.guard.require_sound(0, "refuse", [GPU0])


@pytest.mark.parametrize("refused", ["nvmlDeviceGetTotalEccErrors", "nvmlDeviceGetHandleByUUID"])
def test_a_gpu_whose_errors_are_not_counted_is_taken_to_be_sound(refused: str) -> None:
    machine = Machine()
    if refused == "nvmlDeviceGetTotalEccErrors":
        machine.a.refuses[refused] = pynvml.NVML_ERROR_NOT_SUPPORTED
    else:
        machine.driver.cards.clear()
    machine.guard.require_sound(0, "refuse", [GPU0])
    machine.a.errors = 100
    machine.guard.require_sound(0, "refuse", [GPU0])


def test_states_on_cpus_ask_nobody() -> None:
    machine = Machine()
    machine.guard.require_sound(0, "refuse", [CPU])
    assert machine.driver.calls == []


def refuse_on_rank_1() -> None:
    """A round in which the GPU of rank 1 is found to have had an error."""
    machine = Machine()
    machine.guard.watch([GPU0])
    coordinator = Coordinator.connect(timeout=60)

    def state_it() -> bytes:
        machine.a.errors += coordinator.rank
        machine.guard.require_sound(coordinator.rank, "refuse", [GPU0])
        return b""

    try:
        coordinator.round("save: tables", state_it)
    finally:
        coordinator.close()


def test_all_ranks_refuse_what_one_has_to(ranks: RankPool) -> None:
    outcomes = ranks.run_expecting_errors(2, refuse_on_rank_1)
    assert [type(outcome) for outcome in outcomes] == [DeviceMemoryError] * 2
    assert [(error.rank, error.gpus[0]["new"]) for error in outcomes] == [(1, 1)] * 2
