# SPDX-License-Identifier: Apache-2.0
"""Each check finds what is wrong with machines that are not there, says what to do, and leaves healthy ones in peace."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pynvml
import pytest
import torch
import typer

from shardckpt.cli.doctor import report
from shardckpt.doctor import Diagnosis, Finding, Machine, examine
from shardckpt.doctor.gpus import ranges
from shardckpt.doctor.speed import Staging, measure_copying, measure_staging
from shardckpt.gpu import GPU, Link, Nvml, local_nvml
from tests.cli.run import run
from tests.gpu.driver import GIB, Card, Cuda, Driver

A, B = "11111111-2222-3333-4444-555555555555", "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
FAST = Staging(55e9, True, Link(5, 16))


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
    available: int | None = 64 * GIB,
    limit: int | None = None,
    torch_version: str = "2.13.0+cu130",
    cpus: frozenset[int] = frozenset(range(128)),
    copying: float = 12e9,
    staging: Staging | Exception = FAST,
) -> Machine:
    """A machine with these cards, all of which torch can use unless others are named."""
    uuids = tuple(card.uuid.removeprefix("GPU-") for card in cards) if usable is None else usable
    return Machine(
        nvml=Nvml(Driver(*cards, init=init), numa_node=lambda bus_id: 1),
        cuda=Cuda(*uuids),
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
        (machine(Card(f"GPU-{A}"), usable=()), "gpus", "problem", "1 here, and torch can use none", "CUDA_VISIBLE_DEVICES"),
        (
            machine(usable=(A,), init=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND),
            "gpus",
            "warning",
            "memory errors go unnoticed",
            "NVIDIA_DRIVER_CAPABILITIES",
        ),
        (machine(Card(f"GPU-{A}", errors=2)), "gpu 0 memory errors", "problem", "2 that ECC could not correct", f"GPU-{A}"),
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
        (machine(Card(f"GPU-{A}"), staging=Staging(400e9, True, Link(5, 16))), "gpu 0 staging", "it does not go over PCIe"),
        (machine(Card(f"GPU-{A}"), staging=Staging(55e9, True, None)), "gpu 0 link", "gen 1 x16 of gen 5 x16"),
        (machine(Card(f"GPU-{A}", max_link=(9, 16)), staging=Staging(1e9, True, None)), "gpu 0 staging", "1 GB/s"),
    ],
)
def test_what_is_not_known_is_not_held_against_a_machine(unknown: Machine, check: str, said: str) -> None:
    finding = findings(examine(unknown))[check]
    assert said in finding.text
    if check != "gpu 0 link":
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
    assert (finding.status, finding.text) == ("ok", "not measured, to save time")
    assert finding.remedy.endswith(f"CUDA_VISIBLE_DEVICES=GPU-{B}")


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
