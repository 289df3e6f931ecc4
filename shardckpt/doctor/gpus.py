# SPDX-License-Identifier: Apache-2.0
"""Checks of the GPUs: whether they can be used, whether their memory is sound, and how fast it leaves them."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter

from ..gpu import GPU
from .finding import Finding, gigabytes
from .machine import Machine

_LITTLE_MEMORY = 1 << 30
_SLOW_SHARE = 0.6
"""Of the link's limit; packet headers leave about 0.85 to 0.9 of it to data."""


def check_gpus(machine: Machine) -> Iterator[Finding]:
    """Whether torch can use the GPUs that are here, and what they are tells the driver."""
    gpus = machine.gpus
    if machine.cuda.is_available():
        if machine.nvml.missing is None:
            yield Finding("gpus", "ok", f"{len(gpus)} usable", values={"usable": len(gpus)})
        else:
            yield Finding(
                "gpus",
                "warning",
                f"{len(gpus)} usable, of which little is known ({machine.nvml.missing}): memory errors go unnoticed",
                "let the container have the driver's management library: NVIDIA_DRIVER_CAPABILITIES=compute,utility",
                {"usable": len(gpus)},
            )
    elif not gpus:
        yield Finding("gpus", "ok", "none here; saves stage tensors of the CPU", values={"usable": 0})
    elif machine.cuda_version is None:
        yield Finding(
            "gpus",
            "warning",
            f"{len(gpus)} here, and this torch was built without CUDA",
            "install a build of torch with CUDA to use them (pytorch.org/get-started)",
            {"usable": 0},
        )
    else:
        yield Finding(
            "gpus",
            "problem",
            f"{len(gpus)} here, and torch can use none of them",
            f"see what torch.cuda.init() raises: a driver too old for CUDA {machine.cuda_version}, or a CUDA_VISIBLE_DEVICES "
            "that names none of them",
            {"usable": 0},
        )


def check_errors(machine: Machine) -> Iterator[Finding]:
    """Whether ECC has found memory errors that it could not correct."""
    for gpu in machine.gpus:
        check, count = f"{_name(gpu)} memory errors", gpu.uncorrected_errors
        values = {"uuid": gpu.uuid, "uncorrected": count}
        if count is None:
            yield Finding(check, "ok", "not counted by this GPU or driver", values=values)
        elif count == 0:
            yield Finding(check, "ok", "none that ECC could not correct since the driver was loaded", values=values)
        else:
            yield Finding(
                check,
                "problem",
                f"{count} that ECC could not correct since the driver was loaded",
                f"take {gpu} out of use until it was reset (nvidia-smi --gpu-reset) or, if they come back, replaced; "
                "nvidia-smi -q -d ECC,ROW_REMAPPER tells more",
                values,
            )


def check_free_memory(machine: Machine) -> Iterator[Finding]:
    """Whether a GPU has room for the little that staging takes."""
    for gpu in machine.gpus:
        if gpu.memory_free is None:
            continue
        total = "" if gpu.memory_total is None else f" of {gigabytes(gpu.memory_total)}"
        text = f"{gigabytes(gpu.memory_free)} free{total}"
        values = {"uuid": gpu.uuid, "free": gpu.memory_free, "total": gpu.memory_total}
        if gpu.memory_free < _LITTLE_MEMORY:
            remedy = "nvidia-smi shows which processes hold it; those of an earlier job may have been left behind"
            yield Finding(f"{_name(gpu)} memory", "warning", text, remedy, values)
        else:
            yield Finding(f"{_name(gpu)} memory", "ok", text, values=values)


def check_place(machine: Machine) -> Iterator[Finding]:
    """Whether this process may run on the CPUs near a GPU, and so have its buffers there."""
    for gpu in machine.gpus:
        if not gpu.cpus:
            continue
        node = "" if gpu.numa_node is None else f"NUMA node {gpu.numa_node}, "
        text, values = f"{node}CPUs {ranges(gpu.cpus)}", {"uuid": gpu.uuid, "numa_node": gpu.numa_node, "cpus": list(gpu.cpus)}
        if machine.cpus.isdisjoint(gpu.cpus):
            yield Finding(
                f"{_name(gpu)} place",
                "warning",
                f"{text}, none of which this process may use: staged states lie on another node",
                "let each rank use the CPUs near its GPU (numactl, --cpu-bind of srun, cpuset of the container)",
                values,
            )
        else:
            yield Finding(f"{_name(gpu)} place", "ok", text, values=values)


def check_staging(machine: Machine) -> Iterator[Finding]:
    """How fast states leave a GPU, as a share of what its link can do."""
    begun = perf_counter()
    for gpu in machine.gpus:
        if gpu.index is None:
            continue
        check = f"{_name(gpu)} staging"
        if perf_counter() - begun > machine.patience:
            remedy = f"to measure it, show only this one: CUDA_VISIBLE_DEVICES={gpu.uuid}"
            yield Finding(check, "ok", "not measured, to save time", remedy, {"uuid": gpu.uuid})
            continue
        try:
            machine.staged[gpu.uuid] = machine.measure_staging(gpu, machine.nvml)
        except RuntimeError as error:
            text = f"not measured: {str(error).splitlines()[0]}"
            yield Finding(check, "problem", text, "see whether a process can allocate memory on this GPU", {"uuid": gpu.uuid})
        else:
            yield _judge_staging(machine, gpu, check)


def _judge_staging(machine: Machine, gpu: GPU, check: str) -> Finding:
    staged = machine.staged[gpu.uuid]
    link = gpu.max_link or staged.link
    limit = None if link is None else link.bytes_per_second
    share = None if limit is None else staged.bytes_per_second / limit
    values = {"uuid": gpu.uuid, "bytes_per_second": staged.bytes_per_second, "limit": limit, "share": share}
    text = f"{gigabytes(staged.bytes_per_second)}/s"
    if limit is not None and share is not None:
        beyond = ": it does not go over PCIe" if share > 1 else ""
        text += f", {share:.0%} of the {gigabytes(limit)}/s of {link}{beyond}"
    if not staged.is_locked:
        remedy = "host memory cannot be page-locked: see the log, and the memory limits of the container"
        return Finding(check, "warning", f"{text}, into memory that is not page-locked", remedy, values)
    if share is not None and share < _SLOW_SHARE:
        remedy = "see the GPU's place and link; in a virtual machine, its IOMMU; on the host, ACS on PCIe switches"
        return Finding(check, "warning", text, remedy, values)
    return Finding(check, "ok", text, values=values)


def check_links(machine: Machine) -> Iterator[Finding]:
    """Whether links are as wide and fast as GPU and slot allow."""
    for gpu in machine.gpus:
        staged = machine.staged.get(gpu.uuid)
        link = gpu.link if staged is None or staged.link is None else staged.link
        best = gpu.max_link
        if link is None or best is None:
            continue
        limit = best.bytes_per_second
        text = f"{link} of {best}" + ("" if limit is None else f", at most {gigabytes(limit)}/s")
        values = {"uuid": gpu.uuid, "now": str(link), "best": str(best), "limit": limit}
        # an idle link may be slow to save power; it is never narrow for that
        is_slow = staged is not None and link.generation < best.generation
        if link.width < best.width or is_slow:
            remedy = "the link did not come up as it should: reseat the GPU or its riser, or look at the slot's settings"
            yield Finding(f"{_name(gpu)} link", "warning", text, remedy, values)
        else:
            yield Finding(f"{_name(gpu)} link", "ok", text, values=values)


def ranges(numbers: tuple[int, ...]) -> str:
    """Ascending numbers in the way of lists of CPUs: ``0-3,8``."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _name(gpu: GPU) -> str:
    return f"gpu {gpu.uuid if gpu.index is None else gpu.index}"
