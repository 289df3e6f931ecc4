# SPDX-License-Identifier: Apache-2.0
"""Clients of the test's S3 server: ours, and boto3 to look behind it."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import boto3
from obstore.store import from_url

from shardckpt.store.object import ObjectStore

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Backend


def client(endpoint: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )


def backend(url: str, endpoint: str, retries: int = 0) -> Backend:
    """The library's client; single requests are tried again ``retries`` times, without waiting long."""
    return from_url(
        url,
        config={
            "endpoint": endpoint,
            "access_key_id": "key",
            "secret_access_key": "secret",
            "region": "us-east-1",
            "virtual_hosted_style_request": False,
        },
        client_options={"allow_http": True, "timeout": timedelta(seconds=20)},
        retry_config={
            "max_retries": retries,
            "backoff": {"init_backoff": timedelta(milliseconds=5), "max_backoff": timedelta(milliseconds=10)},
        },
    )


def object_store(endpoint: str, prefix: str, bucket: str = "bucket", retries: int = 0) -> ObjectStore:
    """The objects under ``prefix``."""
    url = f"s3://{bucket}/{prefix}"
    return ObjectStore(url, backend(url, endpoint, retries))
