# SPDX-License-Identifier: Apache-2.0
"""Data that ranks give each other out of memory: the right bytes to who knows the secret, and storage in place of all else."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.buffer import Buffer
from shardckpt.checksum import block_digests
from shardckpt.coordinate import Coordinator
from shardckpt.feed import Feed
from shardckpt.images import ImageServer, OwnImage, PeerImage
from shardckpt.keystore import KeyClient, KeyServer, listen
from shardckpt.layout import Mesh, MeshLayout, Shard
from shardckpt.maintain.verify import verify
from shardckpt.manifest import manifest_digest
from shardckpt.neighbors import Neighbors, reachable_address
from shardckpt.parity.record import find_parity
from shardckpt.parity.xor import Body, Image, Others
from shardckpt.protect import Committed, protect
from shardckpt.store import MemoryStore
from tests.engine.pairs import on_two_ranks
from tests.engine.simulate import ATTEMPT, by_hand, save
from tests.ranks import RankPool, meet
from tests.store.helpers import some_bytes, store_file

BLOCK = 1 << 12
CHUNK = 4 * BLOCK
SIZE = 5 * CHUNK + 77
"""Bytes."""
PATIENCE = 60.0
_numbers = itertools.count()


def a_feed(seed: int = 0, size: int = SIZE) -> Feed:
    """The data region of a rank, staged, and written."""
    memory = Buffer(-(-size // CHUNK) * CHUNK)
    memory.bytes[:size] = some_bytes(size, seed)
    feed = Feed(memory, size, CHUNK)
    feed.staged({}, {})
    feed.begin(lambda view: block_digests(view, BLOCK), 1)
    return feed


@pytest.fixture(scope="module")
def server() -> Iterator[ImageServer]:
    """Of the first region."""
    server = ImageServer(a_feed())
    yield server
    server.close()


@pytest.fixture
def peer(server: ImageServer) -> Iterator[PeerImage]:
    """One that calls it."""
    peer = PeerImage("localhost", server.port, server.secret)
    yield peer
    peer.close()


def taken(image: Image, start: int, stop: int) -> bytes | None:
    """What an image gives."""
    into = memoryview(bytearray(stop - start))
    return bytes(into) if image.read(start, stop, into) else None


@given(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted))
def test_any_range_is_given_as_it_is(server: ImageServer, bounds: list[int]) -> None:
    start, stop = bounds
    wanted = some_bytes(SIZE, 0)[start:stop]
    peer = PeerImage("localhost", server.port, server.secret)
    assert taken(peer, start, stop) == wanted
    assert taken(peer, start, stop) == wanted
    peer.close()
    assert taken(OwnImage(a_feed()), start, stop) == wanted


def test_without_the_secret_nothing_is_given(server: ImageServer, peer: PeerImage) -> None:
    stranger = PeerImage("localhost", server.port, bytes(16))
    assert taken(stranger, 0, 10) is None
    assert taken(stranger, 0, 10) is None
    assert taken(peer, 0, 10) == some_bytes(SIZE, 0)[:10]


@pytest.mark.parametrize(("start", "stop"), [(0, SIZE + 1), (7, 3), (1 << 63, (1 << 63) + 1)])
def test_who_asks_for_what_is_not_there_is_hung_up_on(server: ImageServer, start: int, stop: int) -> None:
    with socket.create_connection(("localhost", server.port), PATIENCE) as connection:
        connection.sendall(server.secret + struct.pack("<QQ", start, stop))
        assert connection.recv(1) == b""


def test_who_says_half_a_word_and_leaves_does_no_harm(server: ImageServer, peer: PeerImage) -> None:
    for said in (b"", server.secret[:5], server.secret + b"\1\2"):
        with socket.create_connection(("localhost", server.port), PATIENCE) as connection:
            connection.sendall(said)
    assert taken(peer, 5, 500) == some_bytes(SIZE, 0)[5:500]


def test_a_closed_server_hangs_up_on_everybody() -> None:
    server = ImageServer(a_feed())
    peer = PeerImage("localhost", server.port, server.secret)
    assert taken(peer, 0, 9) == some_bytes(SIZE, 0)[:9]
    server.close()
    assert taken(peer, 0, 9) is None
    peer.close()


def test_who_does_not_say_the_secret_is_hung_up_on() -> None:
    server = ImageServer(a_feed(), patience=2.0)
    with socket.create_connection(("localhost", server.port), PATIENCE) as connection:
        connection.sendall(server.secret[:-1])
        assert connection.recv(1) == b""
    peer = PeerImage("localhost", server.port, server.secret)
    assert taken(peer, 0, 9) == some_bytes(SIZE, 0)[:9]
    peer.close()
    server.close()


def trickle(listener: socket.socket, is_over: threading.Event) -> None:
    """Give a caller one byte after the other, slowly, and never all."""
    caller, _ = listener.accept()
    with caller, contextlib.suppress(OSError):
        while not is_over.wait(0.05):
            caller.sendall(b"x")


def test_a_range_that_trickles_in_is_not_waited_for() -> None:
    """Each byte comes in time, and all of them would take days."""
    is_over = threading.Event()
    with listen() as listener, ThreadPoolExecutor(1) as threads:
        threads.submit(trickle, listener, is_over)
        peer = PeerImage("localhost", listener.getsockname()[1], bytes(16), patience=2.0)
        try:
            assert taken(peer, 0, 1 << 20) is None
            assert taken(peer, 0, 1) is None
        finally:
            peer.close()
            is_over.set()


class Told:
    """An image that gives what it was told to, and counts."""

    def __init__(self, data: bytes | None) -> None:
        self.data = data
        self.asked = 0

    def read(self, start: int, stop: int, into: memoryview) -> bool:
        self.asked += 1
        if self.data is None:
            return False
        into[:] = self.data[start:stop]
        return True


def flipped(data: bytes, at: int) -> bytes:
    """The same but for one bit."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(("kind", "read"), [("right", 0), ("flipped", BLOCK), ("silent", SIZE), ("none", SIZE)])
def test_storage_is_read_for_what_an_image_does_not_give_as_it_was_written(kind: str, read: int) -> None:
    store = MemoryStore(f"images-{kind}")
    data, own = some_bytes(SIZE, 1), some_bytes(SIZE, 2)
    store_file(store, "other", b"header" + data)
    bodies = [
        Body("own", SIZE, 0, 0, block_digests(memoryview(own), BLOCK)),
        Body("other", SIZE + 6, 6, 0, block_digests(memoryview(data), BLOCK)),
    ]
    given_as = {"right": data, "flipped": flipped(data, 3 * BLOCK + 1), "silent": None}
    # the file of "own" is nowhere but in memory
    images: dict[str, Image] = {"own": Told(own)}
    if kind in given_as:
        images["other"] = Told(given_as[kind])
    found = bytearray()
    with Others(store, bodies, BLOCK, images) as others:
        for start in range(0, SIZE, BLOCK):
            stop = min(start + BLOCK, SIZE)
            into, scratch = memoryview(bytearray(BLOCK)), memoryview(bytearray(BLOCK))
            others.combine(start, stop, into, scratch)
            found += into[: stop - start]
        assert others.bytes_read == read
    assert found == bytes(a ^ b for a, b in zip(data, own, strict=True))


def exchange_images(has_own: list[bool]) -> dict[str, bytes | None]:
    """What this rank gets of each one, where some have their data in memory."""
    with Coordinator.connect(timeout=PATIENCE) as coordinator:
        source = a_feed(coordinator.rank) if has_own[coordinator.rank] else None
        with Neighbors(coordinator, "12ab", source) as neighbors:
            images = neighbors.images({rank: f"file-{rank}" for rank in range(coordinator.world_size)})
            found = {name: taken(image, 3, SIZE) for name, image in images.items()}
            coordinator.round("all have it")
        return found


@pytest.mark.parametrize("has_own", [[True, True, True], [False, True, False]])
def test_ranks_find_each_other(ranks: RankPool, has_own: list[bool]) -> None:
    wanted = {f"file-{rank}": some_bytes(SIZE, rank)[3:] for rank, own in enumerate(has_own) if own}
    assert ranks.run(3, exchange_images, has_own, timeout=PATIENCE) == [wanted] * 3


def come_alone(place: str) -> list[str]:
    """Rank 1 asks for the data of rank 0, which does not take part."""
    with Coordinator.connect(timeout=PATIENCE) as coordinator:
        found: list[str] = []
        if coordinator.rank == 1:
            with Neighbors(coordinator, "12ab", a_feed()) as neighbors:
                found = sorted(neighbors.images({0: "zero", 1: "one"}))
        meet(place)
        return found


def test_a_rank_that_tells_nothing_is_left_out(ranks: RankPool) -> None:
    assert ranks.run(2, come_alone, "asked", timeout=PATIENCE) == [[], ["one"]]


class Lying(KeyClient):
    """The connection of a rank that tells the others something else than where it is."""

    def __init__(self, server: KeyServer, place: bytes | None) -> None:
        super().__init__("localhost", server.port, PATIENCE)
        self._place = place

    def set(self, key: str, value: bytes | str) -> None:
        if key.startswith("image-"):
            if self._place is None:
                raise ValueError("this rank does not know where it is")
            value = b"\1\0\0\0" + self._place
        super().set(key, value)


LIES: dict[str, bytes | None] = {
    "nothing": None,
    "noise": b"\xc1\xff\x00",
    "no port": msgspec.msgpack.encode(("other", "localhost", 70_000, bytes(16))),
    "a port of nobody": msgspec.msgpack.encode(("other", "localhost", 1, bytes(16))),
    "no name of a host": msgspec.msgpack.encode(("other", "x" * 70 + ".example", 80, bytes(16))),
    "fields too many": msgspec.msgpack.encode(("other", "localhost", 80, bytes(16), 1)),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_rank_that_tells_nonsense_costs_a_read_of_storage(lie: bytes | None) -> None:
    layout = MeshLayout((40_001, 3), Mesh((0, 1), (2,)), (Shard(0),))
    store = MemoryStore(f"lying-{next(_numbers)}")
    saved = save(store, by_hand(2, {"x": ("float32", layout, (0, 1))}), "step-00000007/")
    committed = Committed("step-00000007/", ATTEMPT, manifest_digest(saved.manifest))

    def part(coordinator: Coordinator) -> None:
        protect(coordinator, store, committed, 2, workers=1)

    assert on_two_ranks(part, second=lambda server: Lying(server, lie)) == [None, None]
    (found,) = verify(store, read_data=True)
    assert found.ok
    assert find_parity(store, "step-00000007/", saved.checkpoint) is not None


def test_a_lone_rank_has_its_own_data() -> None:
    with Coordinator.connect(timeout=PATIENCE) as coordinator, Neighbors(coordinator, "12ab", a_feed()) as neighbors:
        (own,) = neighbors.images({0: "file"}).values()
        assert taken(own, 0, SIZE) == some_bytes(SIZE, 0)


def test_an_address_can_be_told_to_others() -> None:
    address = reachable_address()
    assert socket.getaddrinfo(address, 80)
