# SPDX-License-Identifier: Apache-2.0
"""Checks of the GPUs: whether they can be used, whether their memory is sound, and how fast it leaves them."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter

from ..gpu import GPU, Failure
from .finding import Finding, Status, gigabytes
from .machine import Machine, reason_of

_LITTLE_MEMORY = 1 << 30
_SLOW_SHARE = 0.6
"""Of the link's limit; packet headers leave about 0.85 to 0.9 of it to data."""

_LOOK = "see what nvidia-smi says, and the kernel (dmesg, lines with NVRM and Xid); reset the GPU or restart the node"
_REMEDIES = {
    "LibraryNotFound": "install the NVIDIA driver, or let the container have it and its management library: "
    "docker run --gpus all, NVIDIA_DRIVER_CAPABILITIES=compute,utility",
    "NoPermission": "let this user, job or container use the GPUs: docker run --gpus all, --gres of the job, permissions of "
    "/dev/nvidia*",
    "DriverNotLoaded": "load the kernel module (modprobe nvidia); if it does not load, dmesg says why: it was not built for "
    "this kernel, or not signed for Secure Boot",
    "LibRmVersionMismatch": "the driver was updated while its old kernel module was in use: restart the node, or unload and "
    "load the module; in a container, take out the driver's libraries that are in its image",
    "GpuIsLost": "restart the node; if the GPU is lost again, have it, its power and its slot looked at (dmesg, Xid 79)",
}
"""By the name of the driver's error."""


def check_gpus(machine: Machine) -> Iterator[Finding]:
    """Whether torch and the driver can use the GPUs that are here."""
    usable = [gpu for gpu in machine.gpus if gpu.index is not None]
    if not usable:
        yield _unusable(machine)
    elif machine.nvml.failure is None:
        yield Finding("gpus", "ok", f"{len(usable)} usable", values={"usable": len(usable)})
    else:
        text = f"{len(usable)} usable, of which little is known ({machine.nvml.missing}): memory errors go unnoticed"
        yield Finding("gpus", "warning", text, _remedy(machine.nvml.failure), {"usable": len(usable)})
    for index, reason in machine.refused.items():
        yield Finding(f"gpu {index}", "problem", f"CUDA cannot use it: {reason}", _LOOK, {"index": index})
    for reply in machine.nvml.roll_call():
        # what a job or container was not given is none of its business
        if reply.failure is not None and not reply.failure.is_refusal:
            name = f"gpu {reply.bus_id or f'number {reply.number} of the driver'}"
            text, values = f"the driver does not reach it: {reply.failure.reason}", {"number": reply.number}
            yield Finding(name, "problem", text, _remedy(reply.failure), values)


def _unusable(machine: Machine) -> Finding:
    """Why torch can use no GPU."""
    failure, shown, values = machine.nvml.failure, machine.nvidia_gpus(), {"usable": 0}
    if machine.refused:
        text = f"CUDA counts {len(machine.refused)} and can use none of them"
        return Finding("gpus", "problem", text, _LOOK, values)
    if failure is not None:
        if failure.is_absence and not shown:
            return Finding("gpus", "ok", "none here; saves stage tensors of the CPU", values=values)
        here = f"{len(shown)} here ({', '.join(shown)}), and " if shown else ""
        # a torch for CPUs may be meant where there is no driver
        is_meant = machine.cuda_version is None and failure.is_absence
        status: Status = "warning" if is_meant else "problem"
        return Finding("gpus", status, f"{here}the driver does not work: {failure.reason}", _remedy(failure), values)
    if not machine.gpus:
        failures = [reply.failure for reply in machine.nvml.roll_call() if reply.failure is not None]
        reasons = ", ".join(sorted({found.reason for found in failures}))
        text = f"the driver has {len(failures)} and reaches none of them: {reasons}" if failures else "the driver shows none"
        return Finding("gpus", "problem", text, _remedy(failures[0]) if failures else _LOOK, values)
    here = f"{len(machine.gpus)} here ({', '.join(map(_address, machine.gpus))}), and"
    if machine.cuda_version is None:
        remedy = "install a build of torch with CUDA to use them (pytorch.org/get-started)"
        return Finding("gpus", "warning", f"{here} this torch was built without CUDA", remedy, values)
    remedy = (
        f"see what torch.cuda.init() raises: a driver too old for CUDA {machine.cuda_version}, or a CUDA_VISIBLE_DEVICES "
        "that names none of them"
    )
    return Finding("gpus", "problem", f"{here} torch can use none of them", remedy, values)


def _remedy(failure: Failure) -> str:
    return _REMEDIES.get(failure.kind, _LOOK)


def check_errors(machine: Machine) -> Iterator[Finding]:
    """Whether ECC is on, and has found memory errors that it could not correct."""
    for gpu in machine.gpus:
        check, count, health = f"{_name(gpu)} memory errors", gpu.uncorrected_errors, machine.nvml.memory_health(gpu.uuid)
        values = {"uuid": gpu.uuid, "uncorrected": count, "ecc": health.ecc}
        if count:
            yield Finding(
                check,
                "problem",
                f"{count} that ECC could not correct since the driver was loaded",
                f"take {gpu} out of use until it was reset ({_reset(gpu)}) or, if they come back, replaced; "
                "nvidia-smi -q -d ECC,ROW_REMAPPER tells more",
                values,
            )
        elif health.ecc is False:
            switch = (
                "it is switched on from then" if health.next_ecc else f"switch it on with nvidia-smi -i {_address(gpu)} -e 1"
            )
            remedy = f"{switch}, and reset the GPU while nothing uses it ({_reset(gpu)}) or restart the node"
            yield Finding(check, "warning", "ECC is off: they go unnoticed, and into checkpoints", remedy, values)
        elif count is None:
            yield Finding(check, "ok", "not counted by this GPU or driver", values=values)
        else:
            yield Finding(check, "ok", "none that ECC could not correct since the driver was loaded", values=values)


def check_repair(machine: Machine) -> Iterator[Finding]:
    """Whether damaged memory of a GPU has been taken out of use, which it remembers when the counts begin anew."""
    for gpu in machine.gpus:
        check, health = f"{_name(gpu)} memory repair", machine.nvml.memory_health(gpu.uuid)
        values = {"uuid": gpu.uuid, "beyond_repair": health.beyond_repair, "pending": health.repair_pending}
        if health.beyond_repair:
            text = "a damaged row could not be replaced by a spare one: remapping has failed"
            remedy = f"have {gpu} replaced; nvidia-smi -q -d ROW_REMAPPER tells more"
            yield Finding(check, "problem", text, remedy, values)
        elif health.repair_pending:
            text = "damaged memory is taken out of use for good at the next reset only: remapping or retirement is pending"
            remedy = f"reset {gpu} while nothing uses it ({_reset(gpu)}), or restart the node"
            yield Finding(check, "warning", text, remedy, values)


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
            yield Finding(check, "warning", "not measured, as those before it took long", remedy, {"uuid": gpu.uuid})
            continue
        try:
            machine.staged[gpu.uuid] = machine.measure_staging(gpu, machine.nvml)
        # of torch's several classes, or of the system
        except Exception as error:
            place = "of the host (ulimit -v, limits of the container)" if isinstance(error, OSError) else "on this GPU"
            remedy = f"see whether a process can allocate memory {place}"
            yield Finding(check, "problem", f"not measured: {reason_of(error)}", remedy, {"uuid": gpu.uuid})
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
        busy = None if staged is None else staged.link
        link, best = busy or gpu.link, gpu.max_link
        if link is None or best is None:
            continue
        limit = best.bytes_per_second
        text = f"{link} of {best}" + ("" if limit is None else f", at most {gigabytes(limit)}/s") + ("" if busy else "; idle")
        values = {"uuid": gpu.uuid, "now": str(link), "best": str(best), "limit": limit}
        # an idle link may be slow to save power; it is never narrow for that
        is_slow = busy is not None and busy.generation < best.generation
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
    return f"gpu {_address(gpu) if gpu.index is None else gpu.index}"


def _address(gpu: GPU) -> str:
    """What tools of the driver, and tables of this one, know it by whatever CUDA makes of it."""
    return gpu.bus_id or gpu.uuid


def _reset(gpu: GPU) -> str:
    return f"nvidia-smi -i {_address(gpu)} --gpu-reset"
