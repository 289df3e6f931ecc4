# SPDX-License-Identifier: Apache-2.0
"""Where ranks meet: how rank 0's store comes to be, and how the others find it through the default process group's store."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import torch.distributed as dist

from .errors import CoordinationError, RankTimeout
from .failure import Failure, rebuild
from .wire import Store, Wire, first_failure, name_ranks, tcp_store

GRACE_SECONDS = 5.0
"""How much longer than a deadline one answer of the store may take; also the patience of a farewell."""


class Address(msgspec.Struct, array_like=True):
    """Where rank 0's store is, or why there is none."""

    network: str
    host: str
    port: int
    failure: Failure | None


def default_store() -> Store:
    """The store of the default process group."""
    return dist.distributed_c10d._get_default_store()


def settle(meeting: Wire, key: str, address: Address) -> Address:
    """The address that stands, which is this one unless a rank was faster; raises the failure if it is one."""
    data = msgspec.msgpack.encode(address)
    found = meeting.call(GRACE_SECONDS, lambda store: store.compare_set(key, "", data))
    standing = msgspec.msgpack.decode(found, type=Address)
    if standing.failure is not None:
        raise rebuild(standing.failure)
    return standing


def serve(timeout: float) -> Store:
    """A store of the engine's own, hosted by this process on a free port."""
    try:
        return tcp_store("localhost", 0, timeout, is_master=True)
    except RuntimeError as error:
        raise CoordinationError(f"rank 0 cannot listen on any port for the other ranks: {error}", rank=0) from error


def public_host() -> str:
    """The name under which other hosts reach rank 0, on which this is called."""
    return os.environ.get("MASTER_ADDR") or socket.gethostname()


def network_name() -> str:
    """Equal in two processes only when they share a loopback interface."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/net')}"
    except OSError:
        return socket.gethostname()


def late_ranks(
    label: str, ranks: list[int], hosts: Sequence[str], seconds: float, failures: Mapping[int, Failure] | None = None
) -> RankTimeout:
    """The error for ranks that did not come; ``failures`` are what other ranks posted meanwhile."""
    message = (
        f"{label!r}: no word from {name_ranks(ranks, hosts)} within {seconds:g} s; look for an earlier error in "
        f"{'their logs' if len(ranks) > 1 else 'its log'}, or raise the timeout if there is none"
    )
    if failures:
        message += f" (meanwhile {first_failure(failures).message})"
    return RankTimeout(message, ranks=ranks, label=label, seconds=seconds)
