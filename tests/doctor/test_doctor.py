# SPDX-License-Identifier: Apache-2.0
"""Each check finds what is wrong with machines that are not there, says what to do, and leaves healthy ones in peace."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from time import sleep
from typing import Any

import pynvml
import pytest
import torch
import typer

from shardckpt.cli.doctor import report
from shardckpt.doctor import CHECKS, Diagnosis, Finding, Machine, examine
from shardckpt.doctor.gpus import check_staging, ranges
from shardckpt.doctor.machine import nvidia_gpus
from shardckpt.doctor.speed import Staging, measure_copying, measure_staging
from shardckpt.gpu import GPU, Link, Nvml, local_nvml
from tests.cli.run import run
from tests.gpu.driver import GIB, Card, Cuda, Driver

A, B = "11111111-2222-3333-4444-555555555555", "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
FAST = Staging(55e9, True, Link(5, 16))
LOST = {"nvmlDeviceGetHandleByIndex": pynvml.NVML_ERROR_GPU_IS_LOST}
FORBIDDEN = {"nvmlDeviceGetHandleByIndex": pynvml.NVML_ERROR_NO_PERMISSION}
NO_ECC = dict.fromkeys(
    ["nvmlDeviceGetTotalEccErrors", "nvmlDeviceGetEccMode", "nvmlDeviceGetRemappedRows"], pynvml.NVML_ERROR_NOT_SUPPORTED
)


def staging_like(found: Staging | Exception) -> Callable[[GPU, Nvml], Staging]:
    def measure(gpu: GPU, nvml: Nvml) -> Staging:
        if isinstance(found, Exception):
            raise found
        return found

    return measure


def machine(
    *cards: Card,
    usable: tuple[str, ...] | None = None,
    cuda_version: str | None = "13.0",
    init: int | None = None,
    shown: list[str] | None = None,
    broken: Mapping[int, Exception] | None = None,
    available: int | None = 64 * GIB,
    limit: int | None = None,
    torch_version: str = "2.13.0+cu130",
    cpus: frozenset[int] = frozenset(range(128)),
    copying: float = 12e9,
    staging: Staging | Exception = FAST,
) -> Machine:
    """A machine with these cards, all of which torch can use unless others are named; without any, no driver."""
    if not cards and init is None:
        init = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
    uuids = tuple(card.uuid.removeprefix("GPU-") for card in cards) if usable is None else usable
    return Machine(
        nvml=Nvml(Driver(*cards, init=init or None), numa_node=lambda bus_id: 1),
        nvidia_gpus=lambda: shown or [],
        cuda=Cuda(*uuids, broken=broken),
        cuda_version=cuda_version,
        total_memory=128 * GIB,
        available_memory=lambda: available,
        memory_limit=lambda: limit,
        torch_version=torch_version,
        cpus=cpus,
        measure_copying=lambda nbytes: copying,
        measure_staging=staging_like(staging),
    )


def findings(found: Diagnosis) -> dict[str, Finding]:
    return {finding.check: finding for finding in found.findings}


def test_a_healthy_machine() -> None:
    diagnosis = examine(machine(Card(f"GPU-{A}"), Card(f"GPU-{B}")))
    assert diagnosis.ok
    assert {finding.status for finding in diagnosis.findings} == {"ok"}
    assert not any(finding.remedy for finding in diagnosis.findings)
    assert [(gpu.uuid, gpu.index) for gpu in diagnosis.gpus] == [(f"GPU-{A}", 0), (f"GPU-{B}", 1)]
    found = findings(diagnosis)
    assert found["versions"].values["driver"] == "580.82.07"
    assert found["gpu 0 staging"].text == "55 GB/s, 87% of the 63 GB/s of gen 5 x16"
    assert found["gpu 1 staging"].values["share"] == pytest.approx(0.873, abs=1e-3)
    # as the link was while it was used; it sleeps otherwise
    assert found["gpu 0 link"].text == "gen 5 x16 of gen 5 x16, at most 63 GB/s"
    assert found["gpu 0 place"].text == "NUMA node 1, CPUs 0-1,64-65"


def test_a_machine_without_gpus() -> None:
    diagnosis = examine(machine(cuda_version=None, init=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    assert diagnosis.ok
    assert diagnosis.gpus == ()
    assert list(findings(diagnosis)) == ["versions", "host memory", "host copy", "gpus", "storage", "rendezvous"]
    assert findings(diagnosis)["gpus"].text.startswith("none here")


@pytest.mark.parametrize(
    ("broken", "check", "status", "said", "remedy"),
    [
        (machine(torch_version="2.5.1+cu121"), "versions", "problem", "this torch is too old", "torch>=2.6"),
        (
            machine(available=GIB // 2, limit=GIB),
            "host memory",
            "warning",
            "0.537 GB available of 1.07 GB, the limit of the container or job",
            "chunk by chunk",
        ),
        (machine(available=GIB // 2), "host memory", "warning", "0.537 GB available of 137 GB", "chunk by chunk"),
        (machine(available=100), "host copy", "warning", "not measured", "see host memory"),
        (machine(copying=0.5e9), "host copy", "warning", "0.5 GB/s by one thread", "CPU quota"),
        (machine(Card(f"GPU-{A}"), usable=(), cuda_version=None), "gpus", "warning", "built without CUDA", "a build of torch"),
        (
            machine(Card(f"GPU-{A}"), usable=()),
            "gpus",
            "problem",
            "1 here (0000:3b:00.0), and torch can use none",
            "torch.cuda.init",
        ),
        (
            machine(usable=(A,), init=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND),
            "gpus",
            "warning",
            "memory errors go unnoticed",
            "NVIDIA_DRIVER_CAPABILITIES",
        ),
        (machine(Card(f"GPU-{A}", errors=2)), "gpu 0 memory errors", "problem", "2 that ECC could not correct", f"GPU-{A}"),
        (
            machine(Card(f"GPU-{A}", ecc=(0, 0), refuses={"nvmlDeviceGetTotalEccErrors": pynvml.NVML_ERROR_NOT_SUPPORTED})),
            "gpu 0 memory errors",
            "warning",
            "ECC is off",
            "nvidia-smi -i 0000:3b:00.0 -e 1, and reset",
        ),
        (machine(Card(f"GPU-{A}", ecc=(0, 1))), "gpu 0 memory errors", "warning", "ECC is off", "it is switched on from then"),
        (
            machine(Card(f"GPU-{A}", remapped=(0, 8, 0, 1))),
            "gpu 0 memory repair",
            "problem",
            "remapping has failed",
            "replaced",
        ),
        (machine(Card(f"GPU-{A}", remapped=(0, 1, 1, 0))), "gpu 0 memory repair", "warning", "next reset", "--gpu-reset"),
        (machine(Card(f"GPU-{A}", retiring=1)), "gpu 0 memory repair", "warning", "next reset", "--gpu-reset"),
        (machine(Card(f"GPU-{A}", free=GIB // 4)), "gpu 0 memory", "warning", "0.268 GB free of 85.9 GB", "nvidia-smi"),
        (machine(Card(f"GPU-{A}"), cpus=frozenset({7})), "gpu 0 place", "warning", "none of which", "numactl"),
        (machine(Card(f"GPU-{A}"), staging=Staging(20e9, True, None)), "gpu 0 staging", "warning", "32%", "IOMMU"),
        (
            machine(Card(f"GPU-{A}"), staging=Staging(50e9, False, None)),
            "gpu 0 staging",
            "warning",
            "not page-locked",
            "limits",
        ),
        (
            machine(Card(f"GPU-{A}"), staging=RuntimeError("CUDA error: out of memory\nmore of it")),
            "gpu 0 staging",
            "problem",
            "not measured: CUDA error: out of memory",
            "allocate memory",
        ),
        (machine(Card(f"GPU-{A}"), staging=RuntimeError("")), "gpu 0 staging", "problem", "not measured: RuntimeError", "GPU"),
        (
            machine(Card(f"GPU-{A}"), staging=OSError(12, "Cannot allocate memory")),
            "gpu 0 staging",
            "problem",
            "[Errno 12] Cannot allocate memory",
            "ulimit -v",
        ),
        (
            machine(Card(f"GPU-{A}", link=(1, 8)), staging=Staging(55e9, True, None)),
            "gpu 0 link",
            "warning",
            "gen 1 x8 of gen 5 x16",
            "reseat",
        ),
        (
            machine(Card(f"GPU-{A}"), staging=Staging(55e9, True, Link(4, 16))),
            "gpu 0 link",
            "warning",
            "gen 4 x16 of gen 5 x16",
            "reseat",
        ),
    ],
)
def test_what_is_wrong_is_found(broken: Machine, check: str, status: str, said: str, remedy: str) -> None:
    diagnosis = examine(broken)
    finding = findings(diagnosis)[check]
    assert finding.status == status
    assert said in finding.text
    assert remedy in finding.remedy
    assert diagnosis.ok is (status != "problem")


@pytest.mark.parametrize(
    ("unknown", "check", "said"),
    [
        (machine(limit=1 << 50), "host memory", "68.7 GB available of 137 GB"),
        (machine(torch_version="nightly"), "versions", "torch nightly"),
        (machine(available=None), "host memory", "137 GB; the system does not tell how much is free"),
        (
            machine(Card(f"GPU-{A}", refuses={"nvmlDeviceGetTotalEccErrors": pynvml.NVML_ERROR_NOT_SUPPORTED})),
            "gpu 0 memory errors",
            "not counted by this GPU or driver",
        ),
        (
            machine(Card(f"GPU-{A}", ecc=(0, 0), refuses=NO_ECC)),
            "gpu 0 memory errors",
            "not counted by this GPU or driver",
        ),
        (machine(Card(f"GPU-{A}"), staging=Staging(400e9, True, Link(5, 16))), "gpu 0 staging", "it does not go over PCIe"),
        (machine(Card(f"GPU-{A}"), staging=Staging(55e9, True, None)), "gpu 0 link", "63 GB/s; idle"),
        (machine(Card(f"GPU-{A}", max_link=(9, 16)), staging=Staging(1e9, True, None)), "gpu 0 staging", "1 GB/s"),
    ],
)
def test_what_is_not_known_is_not_held_against_a_machine(unknown: Machine, check: str, said: str) -> None:
    finding = findings(examine(unknown))[check]
    assert said in finding.text
    assert finding.status == "ok"


def test_gpus_of_which_the_driver_tells_nothing() -> None:
    refuses = dict.fromkeys(
        [
            "nvmlDeviceGetPciInfo",
            "nvmlDeviceGetCpuAffinity",
            "nvmlDeviceGetMemoryInfo",
            "nvmlDeviceGetMaxPcieLinkWidth",
            "nvmlDeviceGetCurrPcieLinkWidth",
        ],
        pynvml.NVML_ERROR_NO_PERMISSION,
    )
    diagnosis = examine(machine(Card(f"GPU-{A}", refuses=refuses), staging=Staging(30e9, True, None)))
    assert set(findings(diagnosis)) >= {"gpu 0 memory errors", "gpu 0 staging"}
    assert not {"gpu 0 memory", "gpu 0 place", "gpu 0 link"} & set(findings(diagnosis))
    assert findings(diagnosis)["gpu 0 staging"].text == "30 GB/s"


def test_measuring_many_gpus_ends_in_time() -> None:
    hasty = machine(Card(f"GPU-{A}"), Card(f"GPU-{B}"))
    hasty.patience = 0.0
    finding = findings(examine(hasty))["gpu 1 staging"]
    assert (finding.status, finding.text) == ("warning", "not measured, as those before it took long")
    assert finding.remedy.endswith(f"CUDA_VISIBLE_DEVICES=GPU-{B}")


def test_eight_gpus_are_measured_in_time() -> None:
    def measure(gpu: GPU, nvml: Nvml) -> Staging:
        sleep(0.5 / 4)
        return FAST

    node = machine(*(Card(f"GPU-{number}") for number in range(8)))
    # to set a GPU up takes half a second; here all is four times as fast
    node.patience /= 4
    node.measure_staging = measure
    assert all("not measured" not in finding.text for finding in check_staging(node))


# ---- machines whose driver or GPUs are broken


@pytest.mark.parametrize(
    ("broken", "said", "remedy"),
    [
        (machine(init=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH), "version mismatch", "restart the node"),
        (machine(init=pynvml.NVML_ERROR_DRIVER_NOT_LOADED), "Driver Not Loaded", "modprobe"),
        (machine(init=pynvml.NVML_ERROR_NO_PERMISSION), "Insufficient Permissions", "/dev/nvidia"),
        (machine(init=pynvml.NVML_ERROR_UNKNOWN), "Unknown Error", "dmesg"),
        (machine(shown=["0000:3b:00.0"]), "1 here (0000:3b:00.0), and the driver does not work", "install the NVIDIA driver"),
        (
            machine(Card(f"GPU-{A}", refuses=LOST), Card(f"GPU-{B}", refuses=LOST), usable=()),
            "reaches none",
            "restart the node",
        ),
        (machine(Card(f"GPU-{A}", refuses=FORBIDDEN), usable=()), "Insufficient Permissions", "docker run --gpus all"),
        (machine(init=0), "the driver shows none", "dmesg"),
    ],
)
def test_a_driver_that_does_not_work_is_not_taken_for_a_machine_without_gpus(broken: Machine, said: str, remedy: str) -> None:
    diagnosis = examine(broken)
    finding = findings(diagnosis)["gpus"]
    assert (finding.status, diagnosis.ok) == ("problem", False)
    assert said in finding.text
    assert remedy in finding.remedy
    is_absent = broken.nvml.failure is not None and broken.nvml.failure.is_absence
    assert ("no NVIDIA driver" in findings(diagnosis)["versions"].text) is is_absent


def test_a_lost_gpu_among_sound_ones_is_a_problem() -> None:
    lost, sound = Card(f"GPU-{A}", refuses=LOST), Card(f"GPU-{B}", bus_id="00000000:5D:00.0")
    diagnosis = examine(machine(lost, sound, usable=(B,)))
    found = findings(diagnosis)
    assert not diagnosis.ok
    assert (found["gpus"].status, found["gpus"].text) == ("ok", "1 usable")
    assert (found["gpu number 0 of the driver"].status, diagnosis.gpus[0].bus_id) == ("problem", "0000:5d:00.0")
    lost.refuses = {"nvmlDeviceGetUUID": pynvml.NVML_ERROR_GPU_IS_LOST}
    finding = findings(examine(machine(lost, sound, usable=(B,))))["gpu 0000:3b:00.0"]
    assert (finding.status, finding.text) == ("problem", "the driver does not reach it: GPU is lost")
    assert "restart the node" in finding.remedy


def test_gpus_that_a_job_was_not_given_are_none_of_its_business() -> None:
    diagnosis = examine(machine(Card(f"GPU-{A}", refuses=FORBIDDEN), Card(f"GPU-{B}"), usable=(B,)))
    assert {finding.status for finding in diagnosis.findings} == {"ok"}


def test_a_gpu_that_cuda_cannot_use_does_not_hide_the_others() -> None:
    error = torch.cuda.DeferredCudaCallError("CUDA unknown error\nand where")
    diagnosis = examine(machine(Card(f"GPU-{A}"), Card(f"GPU-{B}"), broken={0: error}))
    found = findings(diagnosis)
    assert [(gpu.uuid, gpu.index) for gpu in diagnosis.gpus] == [(f"GPU-{B}", 1)]
    assert (found["gpu 0"].status, found["gpu 0"].text) == ("problem", "CUDA cannot use it: CUDA unknown error")
    assert found["gpus"].text == "1 usable"
    assert found["gpu 1 staging"].status == "ok"


def test_where_cuda_works_on_no_gpu_those_of_the_driver_are_shown() -> None:
    broken = {0: RuntimeError("CUDA error: all CUDA-capable devices are busy"), 1: RuntimeError("")}
    diagnosis = examine(machine(Card(f"GPU-{A}"), Card(f"GPU-{B}", bus_id="00000000:5D:00.0"), broken=broken))
    found = findings(diagnosis)
    assert [(gpu.uuid, gpu.index) for gpu in diagnosis.gpus] == [(f"GPU-{A}", None), (f"GPU-{B}", None)]
    assert (found["gpus"].status, found["gpus"].text) == ("problem", "CUDA counts 2 and can use none of them")
    assert found["gpu 1"].text == "CUDA cannot use it: RuntimeError"
    # those without a number are told apart by where they are
    assert {"gpu 0000:3b:00.0 memory errors", "gpu 0000:5d:00.0 memory errors"} <= set(found)


def test_without_the_drivers_library_cuda_is_told_of_a_gpu_by_the_name_it_knows() -> None:
    hasty = machine(usable=(A,))
    hasty.patience = 0.0
    assert findings(examine(hasty))["gpu 0 staging"].remedy.endswith(f"CUDA_VISIBLE_DEVICES=GPU-{A}")


@pytest.mark.parametrize(
    ("files", "shown"),
    [
        ({}, []),
        ({"sys/bus/pci/devices/0000:3b:00.0": ("0x10de", "0x030200")}, ["0000:3b:00.0"]),
        ({"sys/bus/pci/devices/0000:3b:00.1": ("0x10de", "0x040300"), "dev/nvidiactl": ()}, []),
        ({"sys/bus/pci/devices/0000:00:02.0": ("0x8086", "0x030000"), "dev/nvidia0": (), "dev/12": ()}, ["/dev/nvidia0"]),
        ({"sys/bus/pci/devices/0000:3b:00.0": ("", "0x030200")}, []),
    ],
    ids=["nothing", "on the bus", "its sound", "hidden bus", "unreadable"],
)
def test_gpus_that_show_without_a_driver(tmp_path: Path, files: dict[str, tuple[str, ...]], shown: list[str]) -> None:
    for name, contents in files.items():
        (tmp_path / name).mkdir(parents=True)
        for file, content in zip(("vendor", "class"), contents, strict=False):
            (tmp_path / name / file).write_text(f"{content}\n")
    assert nvidia_gpus(tmp_path) == shown


def test_a_check_that_fails_is_a_problem_and_the_others_are_run() -> None:
    def check_free_lunch(machine: Machine) -> Iterator[Finding]:
        yield Finding("lunch", "ok", "served")
        raise OSError(12, "Cannot allocate memory")

    diagnosis = examine(machine(), [check_free_lunch, *CHECKS])
    first, second, *others = diagnosis.findings
    assert (first.check, first.status) == ("lunch", "ok")
    assert (second.check, second.status) == ("free lunch", "problem")
    assert second.text == "not checked: [Errno 12] Cannot allocate memory"
    assert second.remedy
    assert {finding.status for finding in others} == {"ok"}


def test_a_torch_that_cannot_even_count_leaves_the_rest_to_be_looked_at() -> None:
    class Broken(Cuda):
        def is_available(self) -> bool:
            raise RuntimeError("no")

    subject = machine(Card(f"GPU-{A}"))
    subject.cuda = Broken()
    diagnosis = examine(subject)
    assert diagnosis.gpus == ()
    assert findings(diagnosis)["gpus"].text == "not checked: no"
    assert findings(diagnosis)["host copy"].status == "ok"


def test_a_process_that_cannot_have_memory() -> None:
    def refuse(nbytes: int) -> float:
        raise OSError(12, "Cannot allocate memory")

    subject = machine()
    subject.measure_copying = refuse
    finding = findings(examine(subject))["host copy"]
    assert (finding.status, "0.537 GB" in finding.text) == ("problem", True)
    assert "ulimit -v" in finding.remedy


def test_lists_of_cpus() -> None:
    assert ranges((0, 1, 2, 3, 8, 10, 11)) == "0-3,8,10-11"
    assert ranges(()) == ""


# ---- the command


def test_the_command_runs_here() -> None:
    done = run("doctor")
    assert "host copy" in done.out
    found = run("doctor", "--json").json
    assert [check["check"] for check in found["checks"]][:3] == ["versions", "host memory", "host copy"]
    assert found["ok"] is (done.status == 0)


def test_a_problem_is_printed_with_its_remedy_and_ends_with_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    diagnosis = examine(machine(Card(f"GPU-{A}", errors=2)))
    with pytest.raises(typer.Exit) as end:
        report(diagnosis, as_json=False)
    assert end.value.exit_code == 1
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[0].split()) == "gpu name numa cpus link now link best limit/s free memory errors"
    assert lines[1].split()[-1] == "2"
    assert any(line.startswith("gpu 0 memory errors: take GPU 0 (") for line in lines)


def test_the_document_has_all_that_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    report(examine(machine(Card(f"GPU-{A}"))), as_json=True)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert found["gpus"][0]["max_link"] == {"generation": 5, "width": 16}
    assert found["gpus"][0]["cpus"] == [0, 1, 64, 65]
    staging = next(check for check in found["checks"] if check["check"] == "gpu 0 staging")
    assert staging["values"]["bytes_per_second"] == 55e9


# ---- measurements


def test_copying_is_measured_here() -> None:
    assert measure_copying(1 << 20) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_staging_is_measured_on_a_gpu() -> None:
    gpu = Machine().gpus[0]
    staged = measure_staging(gpu, local_nvml())
    assert staged.is_locked
    assert staged.bytes_per_second > 1e9
