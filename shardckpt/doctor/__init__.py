# SPDX-License-Identifier: Apache-2.0
"""Whether a machine is fit to save quickly and safely: a list of checks, each of which says what to do about what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ..gpu import GPU
from .finding import Finding, Status
from .gpus import check_errors, check_free_memory, check_gpus, check_links, check_place, check_repair, check_staging
from .host import check_copying, check_memory, check_versions
from .machine import Machine, reason_of
from .network import Network, parse_endpoint
from .rendezvous import check_host_name, check_rendezvous
from .storage import check_storage

Check = Callable[[Machine], Iterator[Finding]]

CHECKS: tuple[Check, ...] = (
    check_versions,
    check_memory,
    check_copying,
    check_gpus,
    check_errors,
    check_repair,
    check_free_memory,
    check_place,
    check_staging,
    # after staging, which makes links that have slept come up
    check_links,
    check_storage,
    check_rendezvous,
    check_host_name,
)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that the checks have found."""

    gpus: tuple[GPU, ...]
    """The GPUs, as they were found before anything was tried on them."""
    findings: tuple[Finding, ...]
    """In the order of the checks."""

    @property
    def ok(self) -> bool:
        """Whether there is no problem; warnings are none."""
        return all(finding.status != "problem" for finding in self.findings)


def examine(machine: Machine, checks: Sequence[Check] = CHECKS) -> Diagnosis:
    """Run the checks. All take a few seconds, 512 MiB of host memory, and 256 MiB of each GPU's and of the storage."""
    gpus: tuple[GPU, ...] = ()
    # the checks that need them say why they are not known
    with suppress(Exception):
        gpus = tuple(machine.gpus)
    return Diagnosis(gpus, tuple(finding for check in checks for finding in _run(check, machine)))


def _run(check: Check, machine: Machine) -> Iterator[Finding]:
    """What a check finds, and that it failed if it does: whatever a broken machine makes of one, the others are run."""
    try:
        yield from check(machine)
    except Exception as error:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        values = {"error": type(error).__name__}
        yield Finding(name, "problem", f"not checked: {reason_of(error)}", "put right what it says, and look again", values)


__all__ = ["CHECKS", "Check", "Diagnosis", "Finding", "Machine", "Network", "Status", "examine", "parse_endpoint"]
