# SPDX-License-Identifier: Apache-2.0
"""The stores that the tests run on, and the S3 server that stands in for a cloud."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardckpt.store import LocalStore, MemoryStore, Store

# Leaves when the tests do, however they end: its standard input is closed then.
_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The address of an S3 server with a bucket named ``bucket``."""
    for package in ("obstore", "moto", "flask", "boto3"):
        pytest.importorskip(package, reason=f"object stores are not tested: {package} is not installed")
    from tests.store.s3 import client

    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        endpoint = f"http://127.0.0.1:{int(process.stdout.readline())}"
        client(endpoint).create_bucket(Bucket="bucket")
        yield endpoint
    finally:
        process.stdin.close()
        process.wait(timeout=20)
        process.stdout.close()


@pytest.fixture(params=["local", "memory", "object"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind in turn."""
    if request.param == "local":
        return LocalStore(tmp_path / "root")
    if request.param == "memory":
        return MemoryStore(uuid.uuid4().hex)
    endpoint = request.getfixturevalue("s3_endpoint")
    from tests.store.s3 import object_store

    return object_store(endpoint, uuid.uuid4().hex)
