# SPDX-License-Identifier: Apache-2.0
"""A feed hands over exactly what was staged, in memory of any size, between threads or processes; and no failure is missed."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.buffer import Buffer
from shardckpt.checksum import block_digests
from shardckpt.crew import share_out
from shardckpt.errors import BackgroundDied, RankFailed, StorageFull
from shardckpt.feed import Failed, Feed, Filled, News, Staged, num_chunks
from tests.engine.waiting import InThread, until, until_blocked

CHUNK = 64
BLOCK = 16
SAMPLES = {"0:[]": {"weight": 17}}
DIGEST = b"8 bytes."


def content(nbytes: int) -> bytes:
    """Bytes that are nowhere alike, so that no chunk passes for another."""
    return b"".join(number.to_bytes(4, "big") for number in range(nbytes // 4 + 1))[:nbytes]


def stage(feed: Feed, data: bytes) -> None:
    """Fill chunk after chunk as there is room."""
    for index in range(feed.chunks):
        at = feed.room(index)
        part = data[index * feed.chunk : (index + 1) * feed.chunk]
        feed.memory.bytes[at : at + len(part)] = part
        feed.filled(index, block_digests(feed.memory.bytes[at : at + len(part)], BLOCK))
    feed.staged(SAMPLES, {})


def digest(chunk: memoryview) -> bytes:
    return block_digests(chunk, BLOCK)


def drain_with_digests(feed: Feed, workers: int) -> list[tuple[bytes, bytes]]:
    """Take all chunks and their digests, in ``workers`` threads."""

    def take(index: int) -> tuple[bytes, bytes]:
        with feed.take(index) as chunk:
            return bytes(chunk.memory[: feed.nbytes - index * feed.chunk]), chunk.digests

    feed.begin(digest, workers)
    return share_out(take, range(feed.chunks), workers, "write")


def drain(feed: Feed, workers: int) -> bytes:
    """Take all chunks, in ``workers`` threads."""
    return b"".join(chunk for chunk, _ in drain_with_digests(feed, workers))


@contextmanager
def bridged(memory: Buffer, nbytes: int, chunk: int) -> Iterator[tuple[Feed, Feed]]:
    """Two feeds on one memory, for who stages and for who writes, and messengers who take their time."""
    to_writer: queue.SimpleQueue[News | None] = queue.SimpleQueue()
    to_stager: queue.SimpleQueue[News | None] = queue.SimpleQueue()
    stager, writer = Feed(memory, nbytes, chunk, to_writer.put), Feed(memory, nbytes, chunk, to_stager.put)

    def carry(news: queue.SimpleQueue[News | None], hear: Callable[[News], object]) -> None:
        while (item := news.get()) is not None:
            hear(item)

    messengers = [InThread(lambda: carry(to_writer, writer.hear)), InThread(lambda: carry(to_stager, stager.hear))]
    try:
        yield stager, writer
    finally:
        to_writer.put(None)
        to_stager.put(None)
        assert [messenger.result() for messenger in messengers] == [None, None]


def make(chunks: int, slots: int) -> Feed:
    return Feed(Buffer(slots * CHUNK), chunks * CHUNK, CHUNK)


@pytest.mark.parametrize(("nbytes", "chunk", "chunks"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (8, 4, 2)])
def test_chunks_are_counted(nbytes: int, chunk: int, chunks: int) -> None:
    assert num_chunks(nbytes, chunk) == chunks
    assert Feed(Buffer(chunk), nbytes, chunk).chunks == chunks


@settings(max_examples=60)
@given(
    nbytes=st.integers(0, 20 * CHUNK),
    chunk=st.integers(1, 2 * CHUNK),
    slots=st.integers(1, 12),
    spare=st.integers(0, CHUNK),
    workers=st.integers(1, 4),
    apart=st.booleans(),
)
def test_what_is_written_is_what_was_staged(nbytes: int, chunk: int, slots: int, spare: int, workers: int, apart: bool) -> None:
    """Whatever the sizes, with few chunks of memory or many, in one process or two."""
    memory = Buffer(slots * chunk + min(spare, chunk - 1))
    with bridged(memory, nbytes, chunk) as two:
        feed = Feed(memory, nbytes, chunk)
        stager, writer = two if apart else (feed, feed)
        assert stager.is_ring == (slots < num_chunks(nbytes, chunk))
        written = InThread(lambda: drain_with_digests(writer, workers))
        staged = InThread(lambda: stage(stager, content(nbytes)))
        assert staged.result() is None
        chunks = written.result()
        assert b"".join(chunk for chunk, _ in chunks) == content(nbytes)
        assert [digests for _, digests in chunks] == [digest(memoryview(chunk)) for chunk, _ in chunks]
        assert writer.samples() == SAMPLES


def test_several_saves_may_follow_each_other_in_the_same_memory() -> None:
    memory = Buffer(3 * CHUNK)
    for nbytes in (10 * CHUNK, 2 * CHUNK - 1, 7 * CHUNK + 5):
        feed = Feed(memory, nbytes, CHUNK)
        written = InThread(lambda feed=feed: drain(feed, 2))  # type: ignore[misc]
        stage(feed, content(nbytes))
        assert written.result() == content(nbytes)


def test_a_whole_image_is_written_when_all_of_it_is_staged() -> None:
    """Before, the two would compete for the processor that training waits for."""
    feed = make(chunks=3, slots=3)
    feed.filled(0, DIGEST)
    taker = InThread(lambda: drain(feed, 1))
    until_blocked(taker, Feed._wait)
    for index in (1, 2):
        feed.filled(index, DIGEST)
    until_blocked(taker, Feed._wait)
    feed.staged({}, {})
    assert taker.result() == bytes(3 * CHUNK)


def test_the_stager_waits_for_room_in_a_ring() -> None:
    feed = make(chunks=3, slots=2)
    for index in (0, 1):
        assert feed.room(index) == index * CHUNK
        feed.filled(index, DIGEST)
    stager = InThread(lambda: feed.room(2))
    with feed.take(1):
        pass
    until_blocked(stager, Feed._wait)
    with feed.take(0):
        until_blocked(stager, Feed._wait)
    assert stager.result() == 0


def test_the_writer_waits_for_each_chunk_of_a_ring() -> None:
    feed = make(chunks=3, slots=1)
    writer = InThread(lambda: drain(feed, 1))
    for index in range(3):
        feed.room(index)
        until_blocked(writer, Feed.take.__wrapped__)  # type: ignore[attr-defined]
        feed.filled(index, DIGEST)
    assert writer.result() == bytes(3 * CHUNK)


def test_samples_come_with_the_last_chunk() -> None:
    feed = make(chunks=2, slots=1)
    asker = InThread(feed.samples)
    writer = InThread(lambda: drain(feed, 1))
    for index in range(2):
        feed.room(index)
        feed.filled(index, DIGEST)
    assert writer.result() == bytes(2 * CHUNK)
    until_blocked(asker, Feed._wait)
    feed.staged(SAMPLES, {})
    assert asker.result() == SAMPLES


# ---- failures


def test_who_fails_to_stage_wakes_all_writers() -> None:
    for slots in (1, 3):
        feed = make(chunks=3, slots=slots)
        writer, asker = InThread(lambda feed=feed: drain(feed, 1)), InThread(feed.samples)  # type: ignore[misc]
        until_blocked(writer, Feed._wait)
        until_blocked(asker, Feed._wait)
        assert feed.fail(StorageFull("no room", name="file"))
        for error in (writer.error(), asker.error()):
            assert isinstance(error, StorageFull)
            assert (error.message, error.name) == ("no room", "file")


def test_who_fails_to_write_wakes_the_stager() -> None:
    feed = make(chunks=3, slots=1)
    feed.filled(0, DIGEST)
    stager = InThread(lambda: feed.room(1))
    until_blocked(stager, Feed._wait)
    assert feed.fail(StorageFull("no room"))
    assert isinstance(stager.error(), StorageFull)


def test_a_failure_is_raised_from_then_on() -> None:
    feed = make(chunks=2, slots=2)
    feed.filled(0, DIGEST)
    assert feed.fail(ValueError("from outside of the tree"))
    assert feed.failure is not None
    calls: list[Callable[[], object]] = [
        lambda: feed.room(0),
        lambda: feed.staged({}, {}),
        lambda: drain(feed, 1),
        feed.samples,
    ]
    for call in calls:
        with pytest.raises(RankFailed, match="ValueError: from outside of the tree"):
            call()
    assert not feed.is_staged


def test_the_first_failure_counts() -> None:
    feed = make(chunks=2, slots=2)
    feed.fail(StorageFull("the first"))
    feed.fail(BackgroundDied("the second"))
    with pytest.raises(StorageFull, match="the first"):
        feed.samples()


@pytest.mark.parametrize("slots", [1, 2])
def test_nothing_can_fail_what_is_staged(slots: int) -> None:
    told: list[News] = []
    feed = Feed(Buffer(slots * CHUNK), 2 * CHUNK, CHUNK, told.append)
    writer = InThread(lambda: drain(feed, 1))
    stage(feed, content(2 * CHUNK))
    told.clear()
    assert not feed.fail(BackgroundDied("too late"))
    assert feed.failure is None
    assert told == []
    assert writer.result() == content(2 * CHUNK)


class Dropped(Feed):
    """Somebody gives the save up at the very moment at which it is staged."""

    gave_up = False

    def hear(self, news: News) -> bool:
        if isinstance(news, Staged):
            self.gave_up = self.fail(StorageFull("dropped"))
        return super().hear(news)


def test_of_a_failure_and_the_end_of_staging_one_comes_first_for_both_sides() -> None:
    """Who is told that a save was given up can rely on it, and so can who is told that it was staged."""
    told: list[News] = []
    feed = Dropped(Buffer(CHUNK), CHUNK, CHUNK, told.append)
    with pytest.raises(StorageFull, match="dropped"):
        stage(feed, content(CHUNK))
    assert (feed.gave_up, feed.is_staged) == (True, False)
    assert [type(news) for news in told] == [Filled, Failed]


def test_a_failure_reaches_the_other_process() -> None:
    with bridged(Buffer(CHUNK), 3 * CHUNK, CHUNK) as (stager, writer):
        taker = InThread(lambda: drain(writer, 1))
        until_blocked(taker, Feed._wait)
        stager.fail(StorageFull("no room"))
        assert isinstance(taker.error(), StorageFull)
    with bridged(Buffer(CHUNK), 3 * CHUNK, CHUNK) as (stager, writer):
        filler = InThread(lambda: stage(stager, content(3 * CHUNK)))
        with writer.take(0):
            until_blocked(filler, Feed._wait)
        writer.fail(StorageFull("no room"))
        assert isinstance(filler.error(), StorageFull)


def test_who_waits_for_the_end_of_staging_sees_either_end() -> None:
    for end in (lambda feed: feed.staged({}, {}), lambda feed: feed.fail(StorageFull("no room"))):
        feed = make(chunks=1, slots=1)
        waiter = InThread(feed.wait_over)
        until_blocked(waiter, Feed.wait_over)
        end(feed)
        assert waiter.result() is None


def test_staging_that_was_heard_of_counts_as_staged() -> None:
    with bridged(Buffer(CHUNK), CHUNK, CHUNK) as (stager, writer):
        stage(stager, content(CHUNK))
        until(lambda: writer.is_staged)
        assert not writer.fail(BackgroundDied("the trainer is gone"))
        assert drain(writer, 1) == content(CHUNK)
