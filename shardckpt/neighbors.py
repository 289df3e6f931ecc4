# SPDX-License-Identifier: Apache-2.0
"""Where the ranks of a save find what the others have just written, as long as it is still in their memory."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import msgspec

from .coordinate import Coordinator
from .feed import Source
from .images import ImageServer, OwnImage, PeerImage
from .meeting import network_name
from .parity.xor import Image
from .wire import Store, delete_all, fetch, put, wait_for

logger = logging.getLogger("shardckpt")

_PATIENCE = 5.0
"""Seconds for the others to tell where they are: they come from the same commit."""


class _Place(msgspec.Struct, array_like=True):
    """Where a rank gives the data of its file away; port 0 when it does not."""

    network: str
    host: str
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    secret: bytes


class Neighbors:
    """This rank's data for the others, and theirs for it, from the commit of a save until all have what they want.

    None of it fails, whatever happens: the others wait for this rank. What is not to be had this way is read from storage.
    """

    def __init__(self, coordinator: Coordinator, attempt: str, source: Source | None) -> None:
        """``source`` is what was written, when its bytes stay as they are for as long as this is open."""
        self._coordinator = coordinator
        self._source = source
        self._prefix = f"image-{attempt}"
        self._server: ImageServer | None = None
        self._peers: list[PeerImage] = []

    def __enter__(self) -> Neighbors:
        if self._coordinator.world_size > 1:
            if self._source is not None:
                with contextlib.suppress(OSError, RuntimeError):
                    self._server = ImageServer(self._source)
            place = _Place("", "", 0, b"")
            if self._server is not None:
                place = _Place(network_name(), reachable_address(), self._server.port, self._server.secret)
            data = msgspec.msgpack.encode(place)
            self._call(lambda store: put(store, self._key(self._coordinator.rank), data))
        return self

    def __exit__(self, *_: object) -> None:
        for peer in self._peers:
            peer.close()
        if self._coordinator.world_size > 1:
            self._call(lambda store: delete_all(store, [self._key(self._coordinator.rank)]))
        if self._server is not None:
            self._server.close()

    def images(self, names: Mapping[int, str]) -> dict[str, Image]:
        """What these ranks have in memory, by the names given for them."""
        found: dict[str, Image] = {}
        others = [rank for rank in names if rank != self._coordinator.rank]
        if self._source is not None and len(others) < len(names):
            found[names[self._coordinator.rank]] = OwnImage(self._source)
        for rank, place in self._places(others).items():
            if place.port:
                host = "localhost" if place.network == network_name() else place.host
                peer = PeerImage(host, place.port, place.secret)
                self._peers.append(peer)
                found[names[rank]] = peer
        return found

    def _places(self, ranks: Sequence[int]) -> dict[int, _Place]:
        places: dict[int, _Place] = {}

        def look(store: Store) -> None:
            keys = {rank: self._key(rank) for rank in ranks}
            complete = wait_for(store, list(keys.values()), _PATIENCE)
            there = [rank for rank in ranks if complete or store.check([keys[rank]])]
            for rank, data in zip(there, fetch(store, [keys[rank] for rank in there]), strict=True):
                with contextlib.suppress(msgspec.DecodeError):
                    places[rank] = msgspec.msgpack.decode(data, type=_Place)

        if ranks:
            self._call(look)
        return places

    def _call(self, job: Callable[[Store], object]) -> None:
        try:
            self._coordinator.call(2 * _PATIENCE, job)
        except Exception as error:
            logger.info("other ranks are not asked for what they have in memory: %s", error)

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/{rank}"


def reachable_address() -> str:
    """An address of this host, from the network that leads to rank 0, or else its name."""
    leader = os.environ.get("MASTER_ADDR")
    if leader:
        # no packet is sent: this only chooses the way
        with contextlib.suppress(OSError, UnicodeError):
            family, kind, _, _, address = socket.getaddrinfo(leader, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0])
    return socket.gethostname()
