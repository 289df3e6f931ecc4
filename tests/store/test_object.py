# SPDX-License-Identifier: Apache-2.0
"""Object stores over a network and a service that fail."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from shardckpt.errors import AlreadyExists, ConfigError, MissingFile, StoreError
from shardckpt.store import RetryingStore, open_store
from tests.store.helpers import aligned, load_file, names, some_bytes, store_file
from tests.store.proxy import Fault, Proxy, running_proxy

if TYPE_CHECKING:
    from shardckpt.store.object import ObjectStore

MIB = 1 << 20


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[Proxy]:
    with running_proxy(s3_endpoint) as proxy:
        yield proxy


@pytest.fixture
def store(proxy: Proxy) -> ObjectStore:
    """A store behind the proxy; the library underneath tries nothing again."""
    from tests.store.s3 import object_store

    return object_store(proxy.url, uuid.uuid4().hex)


@pytest.fixture
def s3(s3_endpoint: str) -> Any:
    from tests.store.s3 import client

    return client(s3_endpoint)


def unfinished_uploads(s3: Any) -> list[Any]:
    return list(s3.list_multipart_uploads(Bucket="bucket").get("Uploads", []))


def retrying(store: ObjectStore) -> RetryingStore:
    return RetryingStore(store, sleep=lambda _: None)


LOST_REPLIES = [Fault(method="PUT", forward=True), Fault(method="PUT", forward=True, status=500)]


@pytest.mark.parametrize("fault", LOST_REPLIES)
def test_a_put_whose_reply_was_lost_is_recognised(store: ObjectStore, proxy: Proxy, fault: Fault) -> None:
    proxy.faults.append(fault)
    store.put_if_absent("step-1/manifest.json", b"ours")
    assert store.get("step-1/manifest.json", 10) == b"ours"
    assert not proxy.faults


def test_a_put_that_is_refused_is_not_uncertain(store: ObjectStore, proxy: Proxy) -> None:
    proxy.faults.append(Fault(method="PUT", status=403))
    with pytest.raises(StoreError) as caught:
        store.put_if_absent("step-1/manifest.json", b"ours")
    assert "outcome" not in caught.value.details


def test_a_put_of_which_nobody_can_see_what_became_of_it_is_uncertain(store: ObjectStore, proxy: Proxy) -> None:
    proxy.faults += [Fault(method="PUT", forward=True, status=500), Fault(method="HEAD", status=403)]
    with pytest.raises(StoreError) as caught:
        store.put_if_absent("step-1/manifest.json", b"ours")
    assert caught.value.outcome == "unknown"
    assert store.get("step-1/manifest.json", 10) == b"ours"


def test_412_after_our_own_success_is_success(proxy: Proxy) -> None:
    from tests.store.s3 import object_store

    store = object_store(proxy.url, uuid.uuid4().hex, retries=1)
    proxy.faults.append(Fault(method="PUT", forward=True, status=503))
    store.put_if_absent("step-1/manifest.json", b"ours")
    assert [request for request in proxy.requests if request.startswith("PUT")] == ["PUT ", "PUT "]


@pytest.mark.parametrize("fault", LOST_REPLIES)
def test_a_lost_reply_does_not_turn_a_loser_into_a_winner(store: ObjectStore, proxy: Proxy, fault: Fault) -> None:
    store.put_if_absent("step-1/manifest.json", b"theirs")
    proxy.faults.append(fault)
    with pytest.raises(AlreadyExists):
        retrying(store).put_if_absent("step-1/manifest.json", b"ours")
    assert store.get("step-1/manifest.json", 10) == b"theirs"


@pytest.mark.parametrize("status", [None, 429, 500, 503])
def test_a_put_that_did_not_arrive_is_transient(store: ObjectStore, proxy: Proxy, status: int | None) -> None:
    proxy.faults.append(Fault(method="PUT", status=status))
    with pytest.raises(StoreError) as caught:
        store.put_if_absent("step-1/manifest.json", b"ours")
    assert caught.value.transient is True
    assert caught.value.__cause__ is not None
    assert caught.value.outcome == "unknown", "the request may be on its way yet"
    assert names(store) == []
    proxy.faults.append(Fault(method="PUT", status=status))
    retrying(store).put_if_absent("step-1/manifest.json", b"ours")
    assert store.get("step-1/manifest.json", 10) == b"ours"


@pytest.mark.parametrize("fault", [Fault(method="GET"), Fault(method="GET", status=503), Fault(method="GET", cut=True)])
def test_reads_and_listings_come_through_troubles(store: ObjectStore, proxy: Proxy, fault: Fault) -> None:
    data = some_bytes(3 * MIB)
    store.put_if_absent("step-1/file", data)
    proxy.faults.append(fault)
    assert load_file(retrying(store), "step-1/file") == data
    proxy.faults.append(fault)
    assert names(retrying(store)) == ["step-1/file"]
    assert not proxy.faults


def test_missing_and_forbidden_are_not_tried_again(store: ObjectStore, proxy: Proxy) -> None:
    with pytest.raises(MissingFile):
        retrying(store).open("gone")
    proxy.faults.append(Fault(method="GET", status=403))
    store.put_if_absent("file", b"data")
    with pytest.raises(StoreError, match="check the policy of the bucket"):
        retrying(store).get("file", 10)
    assert [request for request in proxy.requests if request.startswith("GET")] == ["GET "]


def test_an_object_replaced_between_two_reads_is_noticed(store: ObjectStore, s3: Any) -> None:
    store.put_if_absent("file", b"first")
    with store.open("file") as reader:
        s3.put_object(Bucket="bucket", Key=f"{store.url.rpartition('/')[2]}/file", Body=b"other")
        with pytest.raises(StoreError, match="replaced the object"):
            reader.read_at(0, [memoryview(bytearray(5))])


def test_a_large_file_is_assembled_from_parts(store: ObjectStore, proxy: Proxy) -> None:
    data = some_bytes(20 * MIB + 12345)
    view = aligned(data)
    chunks = list(range(0, view.nbytes, 2 * MIB))
    with store.create("step-1/file", len(data)) as writer:
        for offset in [*chunks[3::-1], *chunks[4:]]:
            writer.write_at(offset, view[offset : offset + 2 * MIB])
        assert names(store) == []
        writer.finish()
    assert load_file(store, "step-1/file") == data
    assert sum("partNumber" in request for request in proxy.requests) == 3


@pytest.mark.parametrize("size", [MIB, 20 * MIB])
def test_an_abort_leaves_no_object_and_no_parts(store: ObjectStore, s3: Any, size: int) -> None:
    view = aligned(bytes(size))
    with store.create("step-1/file", size) as writer:
        for offset in range(0, size, MIB):
            writer.write_at(offset, view[offset : offset + MIB])
        if size > MIB:
            deadline = time.monotonic() + 10
            while not unfinished_uploads(s3) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert unfinished_uploads(s3)
    assert names(store) == []
    assert unfinished_uploads(s3) == []


@pytest.mark.skipif(sys.version_info < (3, 11), reason="obstore for Python 3.10 leaves the parts of a failed upload behind")
@pytest.mark.parametrize("part", [1, 2, 3])
def test_a_part_that_fails_fails_the_save_and_cleans_up(store: ObjectStore, proxy: Proxy, s3: Any, part: int) -> None:
    proxy.faults.append(Fault(method="PUT", status=500, query=f"partNumber={part}"))
    data = some_bytes(20 * MIB)
    with pytest.raises(StoreError, match="cannot upload 'step-1/file'"):
        store_file(store, "step-1/file", data)
    assert names(store) == []
    assert unfinished_uploads(s3) == []


def test_an_error_in_a_reply_with_status_200_is_an_error(store: ObjectStore, proxy: Proxy, s3: Any) -> None:
    proxy.faults.append(Fault(method="POST", status=200, query="uploadId"))
    with pytest.raises(StoreError, match="cannot upload") as caught:
        store_file(store, "step-1/file", some_bytes(9 * MIB))
    assert caught.value.transient is True
    assert names(store) == []


def test_writes_wait_when_too_much_is_ahead_of_the_upload(store: ObjectStore) -> None:
    from shardckpt.store.upload import WINDOW, ObjectWriter

    size = WINDOW + 2 * MIB
    data = some_bytes(size)
    view = aligned(data)
    with store.create("file", size) as writer:
        assert isinstance(writer, ObjectWriter)
        writer.write_at(MIB, view[MIB : MIB + WINDOW])
        last = threading.Thread(target=writer.write_at, args=(WINDOW + MIB, view[WINDOW + MIB :]))
        last.start()
        last.join(0.1)
        assert last.is_alive()
        writer.write_at(0, view[:MIB])
        last.join()
        writer.finish()
    assert load_file(store, "file") == data


def test_a_write_that_waits_in_vain_says_for_what(s3_endpoint: str) -> None:
    from shardckpt.store.upload import WINDOW, ObjectWriter
    from tests.store.s3 import backend

    view = aligned(bytes(MIB))
    url = "s3://bucket/vain"
    writer = ObjectWriter(backend(url, s3_endpoint), url, "file", 2 * WINDOW, patience=0.05)
    with writer, pytest.raises(StoreError, match="waits for offset 0"):
        for offset in range(MIB, 2 * WINDOW, MIB):
            writer.write_at(offset, view)


def test_a_bucket_that_is_not_there_is_named(s3_endpoint: str) -> None:
    from tests.store.s3 import object_store

    store = object_store(s3_endpoint, "run", bucket="nowhere")
    for operation in (lambda: store.put_if_absent("file", b""), lambda: store_file(store, "file", b""), store.list):
        with pytest.raises(StoreError, match="nowhere"):
            operation()


def test_urls_that_make_no_sense_are_refused() -> None:
    pytest.importorskip("obstore", reason="object stores are not tested: obstore is not installed")
    with pytest.raises(ConfigError, match="az://container/path"):
        open_store("az://container-without-account/path")


# ---- settings of the environment


def run_with(program: str, **settings: str) -> str:
    """What a program prints that has these in its environment."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("AWS_")}
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env={**kept, **keys, **settings}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plain_http_is_refused_until_the_environment_allows_it(s3_endpoint: str) -> None:
    program = (
        "from shardckpt.errors import StoreError\n"
        "from shardckpt.store import open_store\n"
        f"store = open_store('s3://bucket/{uuid.uuid4().hex}')\n"
        "try:\n"
        "    store.put_if_absent('file', b'data')\n"
        "    print(store.get('file', 10))\n"
        "except StoreError as error: print(error, error.details.get('transient'))\n"
    )
    assert run_with(program, AWS_ENDPOINT_URL=s3_endpoint, AWS_ALLOW_HTTP="true") == "b'data'\n"
    refused = run_with(program, AWS_ENDPOINT_URL=s3_endpoint)
    assert "plain http is refused: set AWS_ALLOW_HTTP=true, or use https None" in refused


def test_the_environment_counts_more_than_what_is_chosen_here() -> None:
    pytest.importorskip("obstore", reason="object stores are not tested: obstore is not installed")
    from shardckpt.store.object import client_options

    ours = client_options("gs://bucket/run", 15.0, {"AWS_ALLOW_HTTP": "true", "GOOGLE_PROXY_URL": ""})
    assert {name: value.total_seconds() for name, value in ours.items()} == {"connect_timeout": 5.0, "timeout": 15.0}  # type: ignore[attr-defined]
    theirs = client_options("az://container/run", 15.0, {"AZURE_PROXY_URL": "http://proxy", "AZURE_TIMEOUT": "1s"})
    assert (theirs["proxy_url"], theirs["timeout"]) == ("http://proxy", "1s")
    assert set(client_options("s3://bucket", 1.0, {"AWS_ALLOW_HTTP": "1"})) == {"allow_http", "connect_timeout", "timeout"}


def test_a_service_that_does_not_answer_is_given_up() -> None:
    program = (
        "import time\n"
        "from shardckpt.errors import StoreError\n"
        "from shardckpt.store.object import ObjectStore\n"
        "begun = time.monotonic()\n"
        "try: ObjectStore('s3://bucket/run', patience=0.5).list()\n"
        "except StoreError as error: print(error.details['transient'], time.monotonic() - begun < 20)\n"
    )
    pytest.importorskip("obstore", reason="object stores are not tested: obstore is not installed")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert run_with(program, AWS_ENDPOINT_URL=endpoint, AWS_ALLOW_HTTP="true") == "True True\n"


def test_without_the_extra_the_error_says_how_to_get_it() -> None:
    program = (
        "import sys; sys.modules['obstore'] = None\n"
        "from shardckpt.errors import ConfigError\n"
        "from shardckpt.store import open_store\n"
        "try: open_store('s3://bucket/run')\n"
        "except ConfigError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "pip install 'shardckpt[cloud]'" in done.stdout, done.stderr
