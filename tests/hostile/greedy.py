# SPDX-License-Identifier: Apache-2.0
"""Manifests of about a kilobyte that ask for as much as they can: some are refused, others have to be cheap."""

from __future__ import annotations

import json
from typing import Any

from shardckpt.checksum import encode_digests
from tests.hostile.base import ATTEMPT, Document, encoded, resealed

BLOCK = 16 << 20


def tiny(tensors: Document, data: int = 0, **fields: Any) -> bytes:
    """A manifest of one rank."""
    digests = encode_digests(b"12345678" * -(-data // BLOCK))
    file = {"rank": 0, "name": f"rank-00000-{ATTEMPT}.safetensors", "size": 4096 + data, "data": 4096}
    return encoded(
        {
            "format": "shardckpt",
            "version": 1,
            "attempt": ATTEMPT,
            "step": 7,
            "created": "",
            "world_size": 1,
            "block_size": BLOCK,
            "meshes": [{"shape": [1], "strides": [0]}],
            "layouts": [{"mesh": 0, "placements": ["S0"]}],
            "tensors": tensors,
            "objects": {},
            "containers": {},
            "files": [file | {"header": "0" * 16, "digests": digests}],
            "torch": "",
            "shardckpt": "",
            **fields,
        }
    )


def claims(numel: int, header: int = 4096) -> bytes:
    """A manifest of one tensor of so many bytes, in a file of that size."""
    manifest = json.loads(tiny({"big": {"dtype": "int8", "shape": [numel], "layout": 0}}, numel))
    manifest["files"][0].update(data=header, size=header + numel)
    return encoded(manifest)


def _empty(count: int) -> Document:
    return {f"t{n}": {"dtype": "int8", "shape": [(1 << 61) + n, 0], "layout": 0} for n in range(count)}


GREEDY: dict[str, bytes] = {
    "list-of-millions": tiny(
        {"l/5": {"dtype": "int8", "shape": [0], "layout": 0}},
        containers={"l": {"$": "container", "kind": "list", "v": 1 << 24}},
    ),
    "many-lists-of-millions": tiny(
        {f"{k}/0": {"dtype": "int8", "shape": [0], "layout": 0} for k in "abcd"},
        containers={k: {"$": "container", "kind": "list", "v": 1 << 24} for k in "abcd"},
    ),
    "shards-of-many-pieces": tiny(_empty(8), layouts=[{"mesh": 0, "placements": ["S0/8192"]}]),
    "shards-of-many-shards": tiny(
        _empty(6),
        meshes=[{"shape": [1] * 16, "strides": [0] * 16}],
        layouts=[{"mesh": 0, "placements": ["S0/2"] * 13 + ["S0"] * 3}],
    ),
    "empty-tensors": tiny(_empty(9)),
    "world-of-a-million": tiny({}, world_size=1 << 20),
    "meshes-of-a-million": tiny({}, meshes=[{"shape": [1 << 20], "strides": [1]}] * 15),
    "header-of-gigabytes": claims(3, header=1 << 33),
    "sum-that-overflows": tiny({f"t{n}": {"dtype": "int8", "shape": [1 << 61], "layout": 0} for n in range(8)}),
    "exabytes": tiny({"big": {"dtype": "int8", "shape": [1 << 60], "layout": 0}}, data=0),
    "nesting": resealed(tiny({}, objects={"n": None}).replace(b'"n":null', b'"n":' + b"[" * 200 + b"]" * 200)),
}
"""By name."""
