# SPDX-License-Identifier: Apache-2.0
"""The engine's own key-value store does what torch's does, and ends cleanly in all ways that stores can end."""

from __future__ import annotations

import datetime
import itertools
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.keystore import ConnectionLost, KeyClient, KeyServer, NotInTime
from shardckpt.wire import Lost, Wire, copy_to_all, delete_all, fetch, put, tcp_store, wait_for
from tests.engine.waiting import InThread, until

PATIENCE = 30.0
SHORT = datetime.timedelta(milliseconds=50)
LONG = datetime.timedelta(seconds=PATIENCE)


@pytest.fixture
def server() -> Iterator[KeyServer]:
    found = KeyServer()
    yield found
    found.close()


def client(server: KeyServer) -> KeyClient:
    return KeyClient("localhost", server.port, PATIENCE)


# ---- the same as torch's


@pytest.fixture(scope="module")
def torch_store() -> Any:
    return tcp_store("localhost", 0, PATIENCE, is_master=True)


@pytest.fixture(scope="module")
def own_store() -> Iterator[KeyClient]:
    server = KeyServer()
    yield client(server)
    server.close()


PREFIXES = itertools.count()
KEYS = st.sampled_from(["a", "b", "c"])
BYTES = st.binary(min_size=1, max_size=40)
OPERATIONS = st.one_of(
    st.tuples(st.just("set"), KEYS, BYTES),
    st.tuples(st.just("set"), KEYS, st.just("text")),
    st.tuples(st.just("compare_set"), KEYS, st.just(""), BYTES),
    st.tuples(st.just("compare_set"), KEYS, st.just("text"), st.just("another")),
    st.tuples(st.just("check"), st.lists(KEYS, min_size=1)),
    st.tuples(st.just("delete_key"), KEYS),
    st.tuples(st.just("add"), st.just("count"), st.integers(0, 5)),
    st.tuples(st.just("multi_set"), st.just(["a", "c"]), st.just([b"1", b"2"])),
)


def prefixed(operation: tuple[Any, ...], prefix: str) -> tuple[str, list[Any]]:
    name, keys, *rest = operation
    return name, [prefix + keys if isinstance(keys, str) else [prefix + key for key in keys], *rest]


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(OPERATIONS, max_size=12))
def test_all_operations_have_the_results_of_torch(torch_store: Any, own_store: KeyClient, operations: Any) -> None:
    prefix = f"{next(PREFIXES)}/"
    set_before: set[str] = set()
    for operation in operations:
        name, arguments = prefixed(operation, prefix)
        if name == "compare_set" and operation[2] and operation[1] not in set_before:
            # torch answers with what was expected, as if it were there
            continue
        found = [getattr(store, name)(*arguments) for store in (torch_store, own_store)]
        assert found[0] == found[1], operation
        if name in ("set", "compare_set", "multi_set"):
            set_before.update(operation[1])
        elif name == "delete_key":
            set_before.discard(operation[1])
    there = [prefix + key for key in "abc" if own_store.check([prefix + key])]
    assert fetch_raw(torch_store, there) == fetch_raw(own_store, there)


def fetch_raw(store: Any, keys: list[str]) -> list[bytes]:
    return [bytes(value) for value in store.multi_get(keys)] if keys else []


# ---- waiting


def test_who_waits_is_woken_by_the_last_key(server: KeyServer) -> None:
    waiting = InThread(lambda: client(server).wait(["a", "b", "c"], LONG))
    other = client(server)
    other.set("b", b"")
    other.add("c", 1)
    other.compare_set("a", "", "there")
    assert waiting.result() is None


def test_who_gets_a_key_waits_for_it(server: KeyServer) -> None:
    getting = InThread(lambda: client(server).get("late"))
    client(server).set("late", b"value")
    assert getting.result() == b"value"


def test_what_is_not_there_in_time(server: KeyServer) -> None:
    own = client(server)
    own.set("a", b"1")
    with pytest.raises(NotInTime, match=r"not there within .*\['a', 'b'\]"):
        own.wait(["a", "b"], SHORT)
    assert wait_for(own, ["b"], 0.0) is False
    assert wait_for(own, ["a"], 0.0) is True
    assert server._waiting == {}


def test_a_wait_holds_up_nobody_else(server: KeyServer) -> None:
    waiting = [InThread(lambda: client(server).get("gate")) for _ in range(20)]
    other = client(server)
    for number in range(100):
        assert other.add("count", 1) == number + 1
    other.set("gate", b"open")
    assert [thread.result() for thread in waiting] == [b"open"] * 20


def test_additions_of_many_at_once_all_count(server: KeyServer) -> None:
    def add() -> list[int]:
        own = client(server)
        return [own.add("count", 1) for _ in range(100)]

    found = [thread.result() for thread in [InThread(add) for _ in range(8)]]
    assert sorted(itertools.chain(*found)) == list(range(1, 801))


def test_only_one_of_many_sets_what_is_not_there(server: KeyServer) -> None:
    def claim(name: str) -> bytes:
        return client(server).compare_set("closer", "", name)

    threads = [InThread(lambda name=str(number): claim(name)) for number in range(8)]  # type: ignore[misc]
    assert len({thread.result() for thread in threads}) == 1


# ---- what the engine sends


@pytest.mark.parametrize("size", [0, 1, 4 << 20, (4 << 20) + 1, 20 << 20])
def test_values_of_any_length(server: KeyServer, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    own = client(server)
    keys = put(own, "value", data)
    assert fetch(client(server), ["value"]) == [data]
    delete_all(own, keys)
    assert not own.check(["value"])


def test_many_keys(server: KeyServer) -> None:
    keys = [str(number) for number in range(1000)]
    copy_to_all(client(server), keys, b"same")
    assert client(server).multi_get(keys) == [b"same"] * 1000


# ---- ends


def test_a_store_that_is_closed_hangs_up_on_all(server: KeyServer, caplog: pytest.LogCaptureFixture) -> None:
    own = client(server)
    own.set("a", b"")
    waiting = InThread(lambda: client(server).get("never"))
    until(lambda: "never" in server._waiting)
    server.close()
    assert isinstance(waiting.error(), ConnectionLost)
    with pytest.raises(ConnectionLost, match="lost the connection to the store"):
        own.check(["a"])
    with pytest.raises(ConnectionLost, match=rf"no store at localhost:{server.port}"):
        client(server)
    server.close()
    assert not caplog.records
    assert not [thread for thread in threading.enumerate() if thread is server._thread]


def test_who_leaves_in_the_middle_of_a_message_disturbs_nobody(server: KeyServer) -> None:
    gone = socket.create_connection(("localhost", server.port), PATIENCE)
    frame = b"\x93\xa4wait"
    gone.sendall(len(frame).to_bytes(4, "little"))
    gone.close()
    own = client(server)
    own.set("a", b"1")
    assert own.get("a") == b"1"


@pytest.mark.parametrize(
    "noise",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\xff\xff\xff",
        b"\x01\x00\x00\x00\xc1",
        b"\x02\x00\x00\x00\x92\x01",
        b"\x06\x00\x00\x00\x92\xa3add\x90",
        b"\x09\x00\x00\x00\x92\xa3add\x92\xa1k\xa1x",
        b"\x08\x00\x00\x00\x92\xa5__del\x90",
    ],
)
def test_noise_disturbs_nobody(server: KeyServer, noise: bytes) -> None:
    own = client(server)
    own.set("a", b"1")
    with socket.create_connection(("localhost", server.port), PATIENCE) as stranger:
        stranger.sendall(noise)
        assert own.get("a") == b"1"
    assert client(server).get("a") == b"1"


def test_through_a_wire_a_lost_store_is_lost_and_a_slow_one_too(server: KeyServer) -> None:
    wire = Wire(lambda: client(server))
    assert wire.call(PATIENCE, lambda store: store.add("n", 1)) == 1
    with pytest.raises(Lost, match=r"no answer within 0\.2 s"):
        wire.call(0.2, lambda store: store.get("never"))
    # the next call has a connection of its own
    assert wire.call(PATIENCE, lambda store: store.add("n", 1)) == 2
    server.close()
    with pytest.raises(Lost):
        wire.call(PATIENCE, lambda store: store.add("n", 1))


def test_the_background_process_loads_no_torch() -> None:
    program = "import sys, shardckpt.background.worker; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == "False"
