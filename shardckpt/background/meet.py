# SPDX-License-Identifier: Apache-2.0
"""How the background processes of all ranks meet: in a store that rank 0's process has made for one save."""

from __future__ import annotations

import msgspec

from shardckpt.coordinate import Coordinator
from shardckpt.keystore import KeyClient
from shardckpt.meeting import Address, network_name, public_host

from .messages import Setup

_DIAL_SECONDS = 15.0
_DIAL_SECONDS_PER_RANK = 0.01
"""The store is there before anybody is told of it: where it does not answer, though all may call at once, it has died."""


def announce(port: int) -> bytes:
    """What rank 0's trainer tells the others of the store at ``port`` of its host."""
    return msgspec.msgpack.encode(Address(network_name(), public_host(), port, None))


def understand(announcement: bytes) -> tuple[str, int]:
    """Host and port by which to reach the store from here; none when there is only one rank."""
    if not announcement:
        return "", 0
    address = msgspec.msgpack.decode(announcement, type=Address)
    return ("localhost" if address.network == network_name() else address.host), address.port


def meet(setup: Setup, meeting: tuple[str, int]) -> Coordinator:
    """A coordinator of the background processes of all ranks, for one of them, or for the trainer of one that has died."""
    host, port = meeting
    patience = min(setup.timeout, _DIAL_SECONDS + _DIAL_SECONDS_PER_RANK * setup.world_size)
    coordinator = Coordinator(setup.rank, setup.world_size, setup.timeout, lambda: KeyClient(host, port, patience))
    coordinator.hosts = setup.hosts
    return coordinator
