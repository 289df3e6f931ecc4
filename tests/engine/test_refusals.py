# SPDX-License-Identifier: Apache-2.0
"""One small edit to a good manifest, and what the validator says to it."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from shardckpt.errors import InvalidManifest, UnsupportedVersion
from shardckpt.layout import BoxLayout, FlatLayout, Mesh, MeshLayout, PerRankShapes, Replicate, Shard
from shardckpt.manifest import Manifest, encode_manifest
from shardckpt.plan import Plan, PlannedTensor
from shardckpt.validate import MAX_WORLD_SIZE, parse_manifest
from tests.engine.simulate import invented_receipts, manifest_of, resealed

Document = dict[str, Any]
Edit = Callable[[Document], object]


def good() -> bytes:
    """A manifest with a tensor of each kind, on 4 ranks."""
    grid = Mesh((0, 1, 2, 3), (2, 2))
    plan = Plan(
        4,
        [
            PlannedTensor("mesh", "float32", MeshLayout((8, 6), grid, (Replicate(), Shard(0))), (1, 2)),
            PlannedTensor("flat", "float32", FlatLayout((5, 2), ((0, 0, 4), (2, 4, 10)))),
            PlannedTensor("boxes", "int64", BoxLayout((4, 4), ((1, (0, 0), (4, 2)), (3, (0, 2), (4, 2))))),
            PlannedTensor("own", "uint8", PerRankShapes(((2,), None, (3,), (0,)))),
            PlannedTensor("value", "uint8", PerRankShapes(((9,),)), is_value=True),
        ],
        {"tied": "mesh"},
    )
    return manifest_of(plan, invented_receipts(plan))


GOOD = good()


def edited(edit: Edit) -> bytes:
    """The good manifest after an edit, canonical where it still fits the schema."""
    document = json.loads(GOOD)
    edit(document)
    try:
        return encode_manifest(msgspec.convert(document, Manifest))
    except msgspec.ValidationError:
        document["checksum"] = document.pop("checksum")
        return resealed(json.dumps(document, separators=(",", ":")).encode())


def put(*path: Any) -> Edit:
    """Set the item at ``path[:-1]`` to ``path[-1]``."""

    def edit(document: Document) -> None:
        at: Any = document
        for key in path[:-2]:
            at = at[key]
        at[path[-2]] = path[-1]

    return edit


def tensor(name: str, **fields: Any) -> Edit:
    """Set fields of a tensor; None takes a field out."""

    def edit(document: Document) -> None:
        record = document["tensors"][name]
        for key, value in fields.items():
            if value is None:
                del record[key]
            else:
                record[key] = value

    return edit


def test_the_good_one_is_good() -> None:
    assert parse_manifest(GOOD).manifest.world_size == 4
    assert edited(lambda document: None) == GOOD


SCHEMA: dict[str, tuple[Edit, str]] = {
    "another format": (put("format", "zip"), "format: 'zip' is not 'shardckpt'"),
    "format that is no text": (put("format", 1), "Expected `str`"),
    "version that is no number": (put("version", "1"), "Expected `int`"),
    "step as bool": (put("step", True), "Expected `int`, got `bool`.*step"),
    "step below 0": (put("step", -1), "Expected `int` >= 0"),
    "step of 64 bits": (put("step", 1 << 63), "Expected `int` <= 9223372036854775807"),
    "step of 100 bits": (put("step", 1 << 100), "invalid manifest"),
    "step with a fraction": (put("step", 1.5), "Expected `int`, got `float`"),
    "a field that is not known": (put("comment", "x"), "unknown field `comment`"),
    "a field of a file that is not known": (put("files", 0, "x", 1), "unknown field `x`"),
    "a field of a tensor that is not known": (put("tensors", "mesh", "x", 1), "unknown field `x`"),
    "a field that is missing": (lambda d: d.pop("files"), "missing required field `files`"),
    "tensors as a list": (put("tensors", []), "Expected `object`"),
    "writers of three": (put("tensors", "mesh", "writers", [1, 2, 3]), "array` of length 2"),
}

WHOLE: dict[str, tuple[Edit, str]] = {
    "no ranks": (put("world_size", 0), "world_size: 0"),
    "too many ranks": (put("world_size", MAX_WORLD_SIZE + 1), f"world_size: {MAX_WORLD_SIZE + 1}"),
    "blocks of odd size": (put("block_size", 65535), "block_size: 65535 is no power of two"),
    "blocks of no bytes": (put("block_size", 0), "block_size: 0"),
    "tiny blocks": (put("block_size", 2048), "block_size: 2048"),
    "a name twice": (put("objects", "mesh", 1), "tensor 'mesh': a value has the same name"),
    "blocks that need too much memory": (put("block_size", 1 << 25), "block_size: 33554432 is no power of two up to"),
}

MESHES: dict[str, tuple[Edit, str]] = {
    "mesh larger than the world": (put("meshes", 0, "shape", [3, 2]), r"meshes\[0\]: 6 ranks in a world of 4"),
    "mesh of nobody": (put("meshes", 0, "shape", [0, 2]), "0 ranks in a world of 4"),
    "mesh with a missing stride": (put("meshes", 0, "strides", [1]), "one stride per dimension is needed"),
    "mesh without ranks": (lambda d: d["meshes"][0].pop("strides"), "neither ranks nor strides"),
    "mesh that is both": (put("meshes", 0, "ranks", [0, 1, 2, 3]), "both listed and regular"),
    "mesh that repeats ranks": (put("meshes", 0, "strides", [0, 1]), "ranks do not fill the shape, or repeat"),
    "mesh of too few ranks": (put("meshes", 0, {"shape": [2, 2], "ranks": [0, 1, 2]}), "do not fill the shape"),
    "mesh outside of the world": (put("meshes", 0, "start", 1), r"meshes\[0\]: rank 4 in a world of 4"),
    "layout on no mesh": (put("layouts", 0, "mesh", 7), r"layouts\[0\]: mesh 7 does not exist"),
    "bad placement": (put("layouts", 0, "placements", ["R", "P"]), r"layouts\[0\]: 'P' is not a placement"),
    "placement missing": (put("layouts", 0, "placements", ["R"]), "one placement per mesh dimension is needed"),
    "sharded dimension": (put("layouts", 0, "placements", ["R", "S2"]), r"tensor 'mesh': sharded dimension 2 of \(8, 6\)"),
}

TENSORS: dict[str, tuple[Edit, str]] = {
    "unknown dtype": (tensor("mesh", dtype="float99"), "tensor 'mesh': unknown dtype 'float99'"),
    "no layout": (tensor("flat", flat=None), "tensor 'flat': exactly one layout is needed"),
    "two layouts": (tensor("flat", layout=0), "exactly one layout is needed"),
    "layout that is not there": (tensor("mesh", layout=3), "tensor 'mesh': layout 3 does not exist"),
    "layout for the exchange": (tensor("flat", flat=None, replicated=True), "only for the exchange between ranks"),
    "overflowing shape": (tensor("mesh", shape=[1 << 60, 8]), "overflows"),
    "too many dimensions": (tensor("mesh", shape=[1] * 65), "65 dimensions"),
    "another shape": (tensor("mesh", shape=[8, 7]), r"bytes where the tensors need"),
    "another dtype": (tensor("mesh", dtype="float64"), r"bytes where the tensors need"),
    "writers: nobody": (tensor("mesh", writers=[0, 0]), r"writers \(0, 0\) of 2 replicas"),
    "writers: too many": (tensor("mesh", writers=[0, 3]), r"writers \(0, 3\) of 2 replicas"),
    "writers: no such replica": (tensor("mesh", writers=[2, 1]), r"writers \(2, 1\) of 2 replicas"),
    "writers: the default": (tensor("mesh", writers=[0, 1]), "default writers are written out"),
    "writers of flat pieces": (tensor("flat", writers=[1, 1]), r"writers \(1, 1\) of 1 replicas"),
    "writers of own tensors": (tensor("own", writers=[0, 2]), "writers without a mesh"),
    "a value of numbers": (tensor("value", dtype="int8"), "tensor 'value': no value"),
    "a value that is shared": (tensor("mesh", value=True), "tensor 'mesh': no value"),
    "flat rank": (tensor("flat", flat=[[0, 0, 4], [4, 4, 10]]), "tensor 'flat': rank 4 in a world of 4"),
    "flat range past the end": (tensor("flat", flat=[[0, 0, 4], [2, 4, 11]]), r"range \[4, 11\) of 10 elements"),
    "flat range backwards": (tensor("flat", flat=[[0, 4, 0], [2, 4, 10]]), r"range \[4, 0\) of 10"),
    "flat gap": (tensor("flat", flat=[[0, 0, 4], [2, 5, 10]]), "flat ranges leave a gap or overlap at element 4"),
    "flat overlap": (tensor("flat", flat=[[0, 0, 4], [2, 3, 10]]), "flat ranges leave a gap or overlap at element 3"),
    "flat end": (tensor("flat", flat=[[0, 0, 4], [2, 4, 9]]), "flat ranges cover 9 of 10 elements"),
    "flat twice": (tensor("flat", flat=[[0, 0, 4], [0, 4, 10]]), "a rank has two ranges"),
    "box rank": (tensor("boxes", boxes=[[1, [0, 0], [4, 2]], [9, [0, 2], [4, 2]]]), "rank 9 in a world of 4"),
    "box dims": (tensor("boxes", boxes=[[1, [0], [4, 2]], [3, [0, 2], [4, 2]]]), "box of rank 1 has other dimensions"),
    "box outside": (tensor("boxes", boxes=[[1, [0, 0], [4, 2]], [3, [0, 3], [4, 2]]]), "box of rank 3 is outside"),
    "box gap": (tensor("boxes", boxes=[[1, [0, 0], [4, 2]], [3, [0, 2], [4, 1]]]), "boxes do not cover"),
    "box overlap": (tensor("boxes", boxes=[[1, [0, 0], [4, 2]], [3, [0, 1], [4, 2]]]), "boxes at .* overlap"),
    "box order": (tensor("boxes", boxes=[[3, [0, 2], [4, 2]], [1, [0, 0], [4, 2]]]), "boxes are not sorted"),
    "box twice": (tensor("boxes", boxes=[[1, [0, 0], [4, 2]], [1, [0, 2], [4, 2]]]), "a rank has two boxes"),
    "own shapes of some": (tensor("own", per_rank=[[2], [3]]), "tensor 'own': shapes for some ranks only"),
    "own shape and another": (tensor("own", shape=[2]), "a shape beside shapes by rank"),
    "own shape too large": (tensor("own", per_rank=[[1 << 62, 2], None, None, None]), "overflows"),
    "alias of nothing": (tensor("tied", alias="none"), "tensor 'tied': an alias of 'none', which is no tensor"),
    "alias of itself": (tensor("tied", alias="tied"), "an alias of 'tied', which is no tensor"),
    "alias with a dtype": (tensor("tied", dtype="int8"), "an alias with fields of its own"),
    "alias with a layout": (tensor("tied", layout=0), "an alias with fields of its own"),
}

FILES: dict[str, tuple[Edit, str]] = {
    "a file is missing": (lambda d: d["files"].pop(), "files: 3 for 4 ranks"),
    "a file too many": (lambda d: d["files"].append(d["files"][0]), "files: 5 for 4 ranks"),
    "files change places": (lambda d: d["files"].reverse(), r"files\[0\]: rank 3 in the place of rank 0"),
    "name with a path": (put("files", 1, "name", "../rank-00001-0123456789abcdef.safetensors"), "file name"),
    "name of a device": (put("files", 1, "name", "/dev/zero"), r"files\[1\]: file name '/dev/zero'"),
    "name in capitals": (put("files", 1, "name", "rank-00001-0123456789ABCDEF.safetensors"), "file name"),
    "name of another rank": (put("files", 1, "name", "rank-00002-0123456789abcdef.safetensors"), "is not of attempt"),
    "name of another attempt": (put("attempt", "feedfeedfeedfeed"), "is not of attempt 'feedfeedfeedfeed'"),
    "attempt with a path": (put("attempt", "../../../etc"), "is not of attempt"),
    "size": (put("files", 2, "size", 4097), r"files\[2\]: 4097 bytes where the tensors need"),
    "data off the grid": (put("files", 2, "data", 4100), r"files\[2\]: data at byte 4100"),
    "data without a header": (put("files", 2, "data", 0), "data at byte 0"),
    "a header of terabytes": (put("files", 2, "data", 1 << 40), "data at byte 1099511627776"),
    "header digest": (put("files", 2, "header", "0" * 15 + "G"), "header digest is not 16 hex digits"),
    "header digest length": (put("files", 2, "header", "0" * 15), "header digest is not 16 hex digits"),
    "digests missing": (put("files", 2, "digests", ""), "0 digests for 1 blocks"),
    "digests too many": (put("files", 2, "digests", base64.b64encode(b"8" * 16).decode()), "2 digests for 1 blocks"),
    "digests not base64": (put("files", 2, "digests", "a!b"), "digests are not base64"),
    "part of a digest": (put("files", 2, "digests", base64.b64encode(b"7" * 7).decode()), "are not whole ones"),
}

EDITS = SCHEMA | WHOLE | MESHES | TENSORS | FILES


@pytest.mark.parametrize(("edit", "message"), EDITS.values(), ids=EDITS)
def test_edits_are_refused(edit: Edit, message: str) -> None:
    data = edited(edit)
    assert data != GOOD
    with pytest.raises(InvalidManifest, match=message) as caught:
        parse_manifest(data)
    assert not isinstance(caught.value, UnsupportedVersion)
    assert str(caught.value).startswith("invalid manifest: ")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        pytest.param(put("version", 2), "has format version 2, this shardckpt reads version 1. Install", id="newer"),
        pytest.param(put("version", 0), "has format version 0", id="older than the first"),
        pytest.param(put("features", ["dedup"]), r"does not know: \['dedup'\]. Install a newer", id="feature"),
        pytest.param(
            lambda d: (d.update(version=3, more={"a": 1}), d.pop("tensors")),
            "format version 3",
            id="newer, and looks different",
        ),
    ],
)
def test_newer_versions_say_what_to_install(edit: Edit, message: str) -> None:
    with pytest.raises(UnsupportedVersion, match=message):
        parse_manifest(edited(edit))


CHANGED: dict[str, bytes] = {
    "nothing": b"",
    "cut": GOOD[:-1],
    "cut in half": GOOD[: len(GOOD) // 2],
    "a list": b"[]",
    "not JSON": b"PK\x03\x04",
    "zeros": bytes(len(GOOD)),
    "bytes at the end": GOOD + b"{}",
    "a line end": GOOD + b"\n",
    "another version": GOOD.replace(b'"version":1', b'"version":3'),
    "another value": GOOD.replace(b'"n":1', b'"n":2'),
    "checksum in capitals": GOOD[:-34] + GOOD[-34:-2].upper() + GOOD[-2:],
    "no checksum": GOOD[: GOOD.rindex(b",")] + b"}",
}


@pytest.mark.parametrize("data", CHANGED.values(), ids=CHANGED)
def test_what_was_changed_after_it_was_written_is_refused(data: bytes) -> None:
    """Whatever it has become: a flipped bit in the version is not taken for a newer format."""
    with pytest.raises(InvalidManifest, match="do not match the checksum at its end") as caught:
        parse_manifest(data)
    assert not isinstance(caught.value, UnsupportedVersion)


# With the right checksum: whoever has written these has done it on purpose, or wrongly.
TEXT: dict[str, tuple[bytes, str]] = {
    "a list": (b"[" + GOOD[:-1] + b"]", "Expected `object`, got `array`"),
    "zeros": (bytes(len(GOOD)), "malformed"),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, "starts with a byte order mark"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "invalid manifest"),
    "not UTF-8": (GOOD.replace(b'"torch":"2', b'"torch":"\xff'), "UTF-8|utf-8"),
    "NaN": (GOOD.replace(b'"n":1', b'"n":NaN'), "malformed"),
    "bytes at the end": (GOOD + b"{}" + bytes(34), "trailing"),
    "spaces at the end": (GOOD + b" " * 34, "trailing"),
    "a space": (GOOD.replace(b",", b", ", 1), "not canonical"),
    "another order": (GOOD.replace(b'"format":"shardckpt","version":1', b'"version":1,"format":"shardckpt"'), "not canonical"),
    "a key twice": (GOOD.replace(b'"step":7', b'"step":6,"step":7'), "not canonical"),
    "a name twice": (GOOD.replace(b'"tied":{', b'"tied":{"alias":"mesh"},"tied":{'), "not canonical"),
    "an escape": (GOOD.replace(b'"format":"s', b'"format":"\\u0073'), "not canonical"),
    "an int as float": (GOOD.replace(b'"step":7', b'"step":7.0'), "not canonical|Expected `int`"),
    "a default": (GOOD.replace(b'"version":1', b'"version":1,"features":[]'), "not canonical"),
    "deep nesting": (GOOD.replace(b'"n":1', b'"n":' + b"[" * 100_000 + b"]" * 100_000), "recursion|depth|nested"),
}


@pytest.mark.parametrize(("data", "message"), TEXT.values(), ids=TEXT)
def test_text_that_is_not_canonical_is_refused(data: bytes, message: str) -> None:
    assert data != GOOD
    with pytest.raises(InvalidManifest, match=message):
        parse_manifest(resealed(data))
