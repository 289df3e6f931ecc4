# SPDX-License-Identifier: Apache-2.0
"""What the driver tells of GPUs, all of it, parts of it, or nothing."""

from __future__ import annotations

import logging

import pynvml
import pytest
import torch

from shardckpt.gpu.nvml import (
    GPU,
    Failure,
    Link,
    MemoryHealth,
    Nvml,
    Reply,
    gpu_of,
    local_nvml,
    read_numa_node,
    spellings,
)
from tests.gpu.driver import GIB, Card, Cuda, Driver

A, B = "11111111-2222-3333-4444-555555555555", "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
NOT_SUPPORTED, LOST = pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_GPU_IS_LOST


def nvml_of(driver: Driver, node: int | None = 1) -> Nvml:
    return Nvml(driver, numa_node=lambda bus_id: node)


def described(driver: Driver, uuid: str, node: int | None = 1) -> GPU:
    gpu = nvml_of(driver, node).describe(uuid)
    assert gpu is not None
    return gpu


def test_all_that_there_is_to_know() -> None:
    nvml = Nvml(Driver(Card(f"GPU-{A}", errors=3)), numa_node={"0000:3b:00.0": 1}.get)
    assert nvml.describe(f"GPU-{A}", index=2) == GPU(
        uuid=f"GPU-{A}",
        index=2,
        name="NVIDIA H100 80GB HBM3",
        bus_id="0000:3b:00.0",
        numa_node=1,
        cpus=(0, 1, 64, 65),
        link=Link(1, 16),
        max_link=Link(5, 16),
        memory_total=80 * GIB,
        memory_free=60 * GIB,
        uncorrected_errors=3,
    )
    assert nvml.driver == "580.82.07"


def test_a_gpu_names_itself() -> None:
    gpu = Nvml(Driver(Card(f"GPU-{A}")), numa_node=lambda bus_id: None).describe(f"GPU-{A}", index=0)
    assert str(gpu) == f"GPU 0 (NVIDIA H100 80GB HBM3, 0000:3b:00.0, GPU-{A})"


def test_a_domain_that_needs_more_than_four_digits() -> None:
    assert described(Driver(Card(f"GPU-{A}", bus_id="00010002:3B:00.0")), f"GPU-{A}").bus_id == "10002:3b:00.0"


@pytest.mark.parametrize(
    ("link", "gigabytes"),
    [
        ((1, 16), 4.0),
        ((2, 16), 8.0),
        ((3, 16), 15.754),
        ((4, 16), 31.508),
        ((5, 16), 63.015),
        ((6, 16), 118.0),
        ((4, 8), 15.754),
    ],
)
def test_the_limit_of_a_link(link: tuple[int, int], gigabytes: float) -> None:
    limit = Link(*link).bytes_per_second
    assert limit == pytest.approx(gigabytes * 1e9, rel=1e-3)


def test_a_link_of_the_future_has_no_known_limit() -> None:
    assert Link(9, 16).bytes_per_second is None
    assert str(Link(9, 16)) == "gen 9 x16"


def test_where_the_kernel_knows_no_node_the_driver_is_asked() -> None:
    assert described(Driver(Card(f"GPU-{A}", nodes=(3,))), f"GPU-{A}", node=None).numa_node == 3
    assert described(Driver(Card(f"GPU-{A}", nodes=())), f"GPU-{A}", node=None).numa_node is None


def test_the_kernel_has_no_node_for_a_device_that_is_not_there() -> None:
    assert read_numa_node("ffff:ff:1f.7") is None


@pytest.mark.parametrize(
    ("function", "field", "missing"),
    [
        ("nvmlDeviceGetName", "name", None),
        ("nvmlDeviceGetPciInfo", "bus_id", None),
        ("nvmlDeviceGetCpuAffinity", "cpus", ()),
        ("nvmlDeviceGetCurrPcieLinkGeneration", "link", None),
        ("nvmlDeviceGetMaxPcieLinkWidth", "max_link", None),
        ("nvmlDeviceGetMemoryInfo", "memory_free", None),
        ("nvmlDeviceGetTotalEccErrors", "uncorrected_errors", None),
    ],
)
@pytest.mark.parametrize("error", [NOT_SUPPORTED, pynvml.NVML_ERROR_NO_PERMISSION, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND])
def test_what_is_not_supported_is_left_out_and_said_once(
    function: str, field: str, missing: object, error: int, caplog: pytest.LogCaptureFixture
) -> None:
    nvml = nvml_of(Driver(Card(f"GPU-{A}", refuses={function: error})))
    with caplog.at_level(logging.INFO, "shardckpt"):
        first, second = nvml.describe(f"GPU-{A}"), nvml.describe(f"GPU-{A}")
    assert first == second
    assert getattr(first, field) == missing
    assert [record.getMessage().split(":")[0] for record in caplog.records].count(function) == 1


def test_a_library_older_than_a_function(caplog: pytest.LogCaptureFixture) -> None:
    class Old(Driver):
        nvmlDeviceGetTotalEccErrors = property()  # reading it raises AttributeError

    with caplog.at_level(logging.INFO, "shardckpt"):
        assert described(Old(Card(f"GPU-{A}")), f"GPU-{A}").uncorrected_errors is None
    assert "nvmlDeviceGetTotalEccErrors: this version of nvidia-ml-py does not have it" in caplog.text


def test_a_machine_without_a_driver_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    driver = Driver(init=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    with caplog.at_level(logging.INFO, "shardckpt"):
        nvml = Nvml(driver)
        assert nvml.missing == "NVML Shared Library Not Found"
        assert (nvml.describe(f"GPU-{A}"), nvml.uncorrected_errors(f"GPU-{A}")) == (None, None)
        assert (nvml.driver, nvml.uuids()) == (None, [])
        assert gpu_of(torch.device("cuda", 0), nvml, Cuda(A), environ={}) is None
    assert len(caplog.records) == 1
    assert driver.calls == []


def test_a_driver_that_vanishes() -> None:
    driver = Driver(Card(f"GPU-{A}", errors=1))
    nvml = nvml_of(driver)
    assert nvml.uncorrected_errors(f"GPU-{A}") == 1
    driver.gone = pynvml.NVML_ERROR_GPU_IS_LOST
    assert nvml.uncorrected_errors(f"GPU-{A}") is None
    assert nvml.describe(f"GPU-{A}") is None
    assert (nvml.driver, nvml.uuids()) == (None, [])
    driver.gone = None
    assert nvml.uncorrected_errors(f"GPU-{A}") == 1


def test_the_real_library_where_there_may_be_no_driver() -> None:
    nvml = local_nvml()
    assert nvml is local_nvml()
    assert nvml.describe("GPU-nonsense") is None
    assert (nvml.missing is None) == (nvml.driver is not None)


# ---- memory errors


def test_memories_are_asked_one_by_one_where_there_is_no_total() -> None:
    at = {pynvml.NVML_MEMORY_LOCATION_DEVICE_MEMORY: 2, pynvml.NVML_MEMORY_LOCATION_SRAM: 3}
    card = Card(f"GPU-{A}", refuses={"nvmlDeviceGetTotalEccErrors": NOT_SUPPORTED}, at=at)
    assert nvml_of(Driver(card)).uncorrected_errors(f"GPU-{A}") == 5


def test_a_count_without_one_of_its_parts_is_none() -> None:
    at = {pynvml.NVML_MEMORY_LOCATION_DEVICE_MEMORY: 2, pynvml.NVML_MEMORY_LOCATION_SRAM: 3}
    card = Card(f"GPU-{A}", refuses={"nvmlDeviceGetTotalEccErrors": NOT_SUPPORTED}, at=at)
    nvml = nvml_of(Driver(card))
    assert nvml.uncorrected_errors(f"GPU-{A}") == 5
    del at[pynvml.NVML_MEMORY_LOCATION_SRAM]
    assert nvml.uncorrected_errors(f"GPU-{A}") is None


def test_counts_keep_coming_from_the_counter_that_worked_first() -> None:
    card = Card(f"GPU-{A}", errors=7, at={pynvml.NVML_MEMORY_LOCATION_SRAM: 1})
    nvml = nvml_of(Driver(card))
    assert nvml.uncorrected_errors(f"GPU-{A}") == 7
    card.refuses["nvmlDeviceGetTotalEccErrors"] = pynvml.NVML_ERROR_UNKNOWN
    assert nvml.uncorrected_errors(f"GPU-{A}") is None


# ---- GPUs that do not answer


@pytest.mark.parametrize(
    ("code", "kind", "is_absence", "is_refusal"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "LibraryNotFound", True, False),
        (pynvml.NVML_ERROR_NO_PERMISSION, "NoPermission", False, True),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "LibRmVersionMismatch", False, False),
        (12345, "", False, False),
    ],
)
def test_why_there_is_nothing_to_ask(code: int, kind: str, is_absence: bool, is_refusal: bool) -> None:
    failure = Nvml(Driver(init=code)).failure
    assert failure is not None
    assert (failure.kind, failure.is_absence, failure.is_refusal) == (kind, is_absence, is_refusal)
    assert failure.reason


def test_a_lost_gpu_is_called_and_hides_no_other() -> None:
    lost = Card(f"GPU-{A}", bus_id="00000000:5D:00.0", refuses={"nvmlDeviceGetHandleByIndex": LOST})
    nvml = nvml_of(Driver(lost, Card(f"GPU-{B}", errors=3)))
    silence = Failure(kind="GpuIsLost", reason="GPU is lost")
    assert nvml.roll_call() == [
        Reply(number=0, uuid=None, bus_id=None, failure=silence),
        Reply(number=1, uuid=f"GPU-{B}", bus_id="0000:3b:00.0", failure=None),
    ]
    assert nvml.uuids() == [f"GPU-{B}"]
    assert nvml.describe(f"GPU-{A}") is None
    assert nvml.uncorrected_errors(f"GPU-{B}") == 3
    lost.refuses = {"nvmlDeviceGetUUID": LOST}
    assert nvml.roll_call()[0] == Reply(number=0, uuid=None, bus_id="0000:5d:00.0", failure=silence)


# ---- what a GPU remembers of errors of its memory


@pytest.mark.parametrize(
    ("card", "health"),
    [
        (Card(f"GPU-{A}"), (True, True, False, False)),
        (Card(f"GPU-{A}", ecc=(0, 1)), (False, True, False, False)),
        (Card(f"GPU-{A}", remapped=(0, 1, 1, 0)), (True, True, False, True)),
        (Card(f"GPU-{A}", remapped=(0, 8, 0, 1)), (True, True, True, False)),
        (Card(f"GPU-{A}", retiring=1), (True, True, None, True)),
        (Card(f"GPU-{A}", retiring=0), (True, True, None, False)),
        (Card(f"GPU-{A}", refuses={"nvmlDeviceGetEccMode": NOT_SUPPORTED}), (None, None, False, False)),
        (Card(f"GPU-{A}", refuses={"nvmlDeviceGetRemappedRows": NOT_SUPPORTED}), (True, True, None, None)),
    ],
    ids=["sound", "off", "pending", "failed", "page pending", "pages", "no ecc", "no repair"],
)
def test_what_a_gpu_remembers(card: Card, health: tuple[bool | None, ...]) -> None:
    found = nvml_of(Driver(card)).memory_health(f"GPU-{A}")
    assert (found.ecc, found.next_ecc, found.beyond_repair, found.repair_pending) == health


def test_an_unknown_gpu_remembers_nothing() -> None:
    unknown = MemoryHealth(ecc=None, next_ecc=None, beyond_repair=None, repair_pending=None)
    assert nvml_of(Driver()).memory_health(f"GPU-{A}") == unknown
    assert Nvml(Driver(init=pynvml.NVML_ERROR_UNKNOWN)).memory_health(f"GPU-{A}") == unknown


def test_a_slice_has_the_memory_of_the_whole() -> None:
    assert nvml_of(mig(remapped=(0, 8, 0, 1))).memory_health(f"MIG-{B}").beyond_repair is True


# ---- MIG


def mig(**whole: object) -> Driver:
    parent = Card(f"GPU-{A}", errors=4, **whole)  # type: ignore[arg-type]
    refused = ("nvmlDeviceGetPciInfo", "nvmlDeviceGetCpuAffinity", "nvmlDeviceGetTotalEccErrors")
    return Driver(
        parent,
        Card(
            f"MIG-{B}",
            name="NVIDIA H100 80GB HBM3 MIG 1g.10gb",
            total=10 * GIB,
            free=9 * GIB,
            parent=parent,
            at={pynvml.NVML_MEMORY_LOCATION_SRAM: 2},
            refuses=dict.fromkeys(refused, NOT_SUPPORTED),
        ),
    )


def test_a_slice_has_its_own_memory_and_the_place_of_the_whole() -> None:
    gpu = described(mig(), f"MIG-{B}")
    assert (gpu.name, gpu.memory_total) == ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10 * GIB)
    assert (gpu.bus_id, gpu.cpus, gpu.max_link) == ("0000:3b:00.0", (0, 1, 64, 65), Link(5, 16))
    assert gpu.uncorrected_errors == 4


def test_a_slice_counts_its_own_errors_where_the_whole_does_not() -> None:
    assert described(mig(refuses={"nvmlDeviceGetTotalEccErrors": NOT_SUPPORTED}), f"MIG-{B}").uncorrected_errors == 2


def test_a_slice_whose_whole_is_not_told() -> None:
    driver = mig()
    driver.cards[1].refuses["nvmlDeviceGetDeviceHandleFromMigDeviceHandle"] = pynvml.NVML_ERROR_NO_PERMISSION
    gpu = described(driver, f"MIG-{B}")
    assert (gpu.memory_total, gpu.bus_id, gpu.uncorrected_errors) == (10 * GIB, None, 2)


@pytest.mark.parametrize("told", [A, B], ids=["of the whole", "of the slice"])
def test_a_slice_is_found_whichever_uuid_torch_tells(told: str) -> None:
    gpu = gpu_of(torch.device("cuda", 0), nvml_of(mig()), Cuda(told), environ={"CUDA_VISIBLE_DEVICES": f"MIG-{B}"})
    assert gpu is not None
    assert (gpu.uuid, gpu.index) == (f"MIG-{B}", 0)


def test_a_slice_is_found_by_its_uuid_alone() -> None:
    gpu = gpu_of(torch.device("cuda", 0), nvml_of(mig()), Cuda(B), environ={})
    assert gpu is not None
    assert gpu.uuid == f"MIG-{B}"


# ---- devices of torch


@pytest.mark.parametrize("order", [(A, B), (B, A), (B,)], ids=["all", "in another order", "only one visible"])
def test_a_device_is_found_by_uuid_however_cuda_numbers_it(order: tuple[str, ...]) -> None:
    nvml = nvml_of(Driver(Card(f"GPU-{A}"), Card(f"GPU-{B}")))
    for index, uuid in enumerate(order):
        gpu = gpu_of(torch.device("cuda", index), nvml, Cuda(*order), environ={})
        assert gpu is not None
        assert (gpu.uuid, gpu.index) == (f"GPU-{uuid}", index)


def test_a_device_without_a_number_is_the_current_one() -> None:
    nvml = nvml_of(Driver(Card(f"GPU-{A}"), Card(f"GPU-{B}")))
    gpu = gpu_of(torch.device("cuda"), nvml, Cuda(A, B, current=1), environ={})
    assert gpu is not None
    assert (gpu.uuid, gpu.index) == (f"GPU-{B}", 1)


def test_a_cpu_is_no_gpu_and_nobody_is_asked() -> None:
    driver = Driver(Card(f"GPU-{A}"))
    assert gpu_of(torch.device("cpu"), nvml_of(driver), Cuda(error=RuntimeError("no"))) is None
    assert driver.calls == []


def test_names_that_a_device_may_have() -> None:
    assert spellings(A, {}) == [f"GPU-{A}", f"MIG-{A}"]
    assert spellings(A, {"CUDA_VISIBLE_DEVICES": f"MIG-{B},GPU-{A}"})[0] == f"MIG-{B}"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Cannot re-initialize CUDA in forked subprocess"),
        AssertionError("no CUDA"),
        torch.cuda.DeferredCudaCallError("CUDA call failed lazily"),
    ],
)
def test_a_torch_that_does_not_tell(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "shardckpt"):
        assert gpu_of(torch.device("cuda", 0), nvml_of(Driver()), Cuda(A, error=error), environ={}) is None
    assert str(error) in caplog.text


def test_a_device_that_the_driver_does_not_know(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "shardckpt"):
        assert gpu_of(torch.device("cuda", 0), nvml_of(Driver(Card(f"GPU-{B}"))), Cuda(A), environ={}) is None
    assert [record.getMessage() for record in caplog.records] == [f"the NVIDIA driver does not know cuda:0, whose UUID is {A}"]


def test_all_gpus_of_the_machine() -> None:
    assert nvml_of(mig()).uuids() == [f"GPU-{A}"]
