# SPDX-License-Identifier: Apache-2.0
"""Where ranks meet: how rank 0's store comes to be, and how the others find it through the default process group's store."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from .errors import ConfigError, CoordinationError, RankTimeout
from .failure import Failure, rebuild
from .wire import Store, Wire, first_failure, name_ranks, tcp_store

if TYPE_CHECKING:
    import torch.distributed as dist

# Torch is imported where it is needed: background processes meet without it.

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
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()


def my_place() -> tuple[int, int]:
    """Rank and world size in the default process group; 0 and 1 without one."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def require_joined(environ: Mapping[str, str] = os.environ) -> None:
    """Raise `ConfigError` when a launcher has started several processes that know nothing of each other: each would save as if
    it were the only one, and all of them to one place."""
    import torch.distributed as dist

    size = environ.get("WORLD_SIZE", "")
    is_joined = dist.is_available() and dist.is_initialized()
    if not is_joined and size.isdecimal() and int(size) > 1:
        raise ConfigError(
            f"WORLD_SIZE={size} says that this process is one of several, but torch.distributed is not set up: call "
            "torch.distributed.init_process_group() before. For a process beside the job, which is no rank of it, unset "
            "WORLD_SIZE, and set SHARDCKPT_RUN=none, so that it is not taken for a new start of the job"
        )


def make_group(timeout: float) -> dist.ProcessGroup:
    """A gloo group of all ranks. Collective; raises `RuntimeError`."""
    import torch.distributed as dist

    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
    return group


def drop_group(group: dist.ProcessGroup) -> None:
    """Leave a group; one that torch does not know, because the user has destroyed the default group before, is left already."""
    import torch.distributed as dist

    with contextlib.suppress(ValueError):
        dist.destroy_process_group(group)


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


def require_same(labels: Mapping[int, str]) -> None:
    """Raise `CoordinationError` unless all ranks, by rank, are in the round of one label."""
    by_label: dict[str, list[int]] = {}
    for rank, label in labels.items():
        by_label.setdefault(label, []).append(rank)
    if len(by_label) > 1:
        places = "; ".join(f"{label!r}: {name_ranks(ranks)}" for label, ranks in by_label.items())
        raise CoordinationError(f"ranks are in different operations ({places}); all have to call the same", labels=by_label)


def check_timeout(timeout: float) -> float:
    """The number of seconds, if it is one that a rank can wait; else raises `ConfigError`."""
    if not 0 < timeout < float("inf"):
        raise ConfigError(f"timeout must be a positive, finite number of seconds, got {timeout!r}", timeout=repr(timeout))
    return timeout
