# SPDX-License-Identifier: Apache-2.0
"""Which carrier the options ask for."""

from __future__ import annotations

from shardckpt.coordinate import Coordinator
from shardckpt.errors import ConfigError
from shardckpt.hostmemory import HostMemory
from shardckpt.options import Options
from shardckpt.store import Store
from shardckpt.store.memory import MemoryStore

from .carrier import Carrier, ThreadCarrier
from .process import ProcessCarrier


def make_carrier(coordinator: Coordinator, store: Store, options: Options) -> Carrier:
    """The carrier of one rank's saves; raises `ConfigError` for a process and a store that lies in the memory of this one."""
    limit, sharers = options.host_memory_limit, coordinator.local_ranks
    share = None if limit is None else limit // sharers
    parity = options.parity_group(coordinator.world_size)
    if options.background == "thread":
        memory = HostMemory(limit=share, sharers=sharers)
        return ThreadCarrier(coordinator, store, memory, workers=options.workers, parity=parity)
    if isinstance(store, MemoryStore):
        raise ConfigError(
            f"{store.url} lies in the memory of this process, where a background process cannot write: take background='thread'"
        )
    memory = HostMemory(limit=share, sharers=sharers, shared=True)
    return ProcessCarrier(coordinator, store, memory, timeout=options.timeout, workers=options.workers, parity=parity)
