# SPDX-License-Identifier: Apache-2.0
"""Clients of the test's S3 server: ours, and boto3 to look behind it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import boto3
from obstore.store import from_url

from shardckpt.store.object import ObjectStore


def client(endpoint: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )


def object_store(endpoint: str, prefix: str, bucket: str = "bucket", retries: int = 0) -> ObjectStore:
    """The objects under ``prefix``; single requests are tried again ``retries`` times, without waiting long."""
    url = f"s3://{bucket}/{prefix}"
    backend = from_url(
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
    return ObjectStore(url, backend)
