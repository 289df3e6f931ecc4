# SPDX-License-Identifier: Apache-2.0
"""Two ranks as threads of one process, whose connections to the store that they share can be made to fail."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from shardckpt.coordinate import Coordinator
from shardckpt.errors import CheckpointError
from shardckpt.keystore import KeyClient, KeyServer

PATIENCE = 120.0
"""Seconds."""

Dial = Callable[[KeyServer], KeyClient]


def dial(server: KeyServer) -> KeyClient:
    """A connection that works."""
    return KeyClient("localhost", server.port, PATIENCE)


def on_two_ranks(
    part: Callable[[Coordinator], object], first: Dial = dial, second: Dial = dial
) -> list[CheckpointError | None]:
    """Run ``part`` on both ranks, which connect to the store in these ways; the errors of the tree that end it."""
    server = KeyServer()
    dials = (first, second)

    def run(rank: int) -> CheckpointError | None:
        with Coordinator(rank, 2, PATIENCE, lambda: dials[rank](server)) as coordinator:
            coordinator.hosts = ("a", "b")
            try:
                part(coordinator)
            except CheckpointError as error:
                return error
        return None

    with closing(server), ThreadPoolExecutor(2) as threads:
        return list(threads.map(run, range(2)))
