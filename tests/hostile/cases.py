# SPDX-License-Identifier: Apache-2.0
"""One manifest per refusal: how it comes about, and what is said to it.

Each is the good manifest after one change, with the right checksum unless that is the point, so that what refuses it is the
check that it is meant for.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shardckpt.errors import InvalidManifest, UnsupportedVersion
from tests.hostile.base import BLOCK, Document, Edit, add_tensor, drop, edited, good, put, replaced, resealed


@dataclass(frozen=True, slots=True)
class Case:
    """A hostile manifest."""

    make: Callable[[], bytes]
    """Its bytes, the same at each call."""
    message: str
    """A pattern that the error matches."""
    kind: type[InvalidManifest] = InvalidManifest
    """Type of the error."""
    is_small: bool = True
    """Whether it is kept as a file."""


def edit(message: str, *edits: Edit) -> Case:
    return Case(lambda: edited(*edits), message)


def text(message: str, old: bytes, new: bytes) -> Case:
    return Case(lambda: replaced(old, new), message)


def whole(message: str, make: Callable[[], bytes]) -> Case:
    return Case(make, message)


def value(message: str, data: Any) -> Case:
    return edit(message, put("objects", "n", data))


def nested(levels: int) -> Case:
    limit = "nested too deep to be decoded" if levels > 900 else "values: nested deeper than 256 levels"
    return text(limit, b'"n":1', b'"n":' + b"[" * levels + b"]" * levels)


TEXT = {
    "checksum": whole("do not match the checksum at its end", lambda: good().replace(b'"n":1', b'"n":2')),
    "cut": whole("do not match the checksum at its end", lambda: good()[:-1]),
    "bom": whole("text: it starts with a byte order mark", lambda: resealed(b"\xef\xbb\xbf" + good())),
    "utf-16": whole("malformed", lambda: resealed(good().decode().encode("utf-16-le"))),
    "not-utf-8": text("UTF-8|utf-8", b'"note":"x"', b'"note":"\xff"'),
    "trailing-bytes": whole("trailing characters", lambda: resealed(good() + b"{}" + b" " * 34)),
    "leading-space": whole("not canonical JSON", lambda: resealed(b" " + good())),
    "nul": text("malformed: invalid character", b'"n":1', b'"n":\x00'),
    "not-an-object": whole("Expected `object`, got `array`", lambda: resealed(b"[" + good()[:-1] + b"]")),
    "key-twice": text("not canonical", b'"step":7', b'"step":6,"step":7'),
    "name-twice": text("not canonical", b'"tied":{', b'"tied":{"alias":"flat"},"tied":{'),
    "value-twice": text("not canonical", b'"n":1', b'"n":2,"n":1'),
    "unsorted": text("not canonical", b'"model/cut":{"dtype"', b'"zzz":{"alias":"flat"},"model/cut":{"dtype"'),
    "escaped-letter": text("not canonical", b'"format":"s', b'"format":"\\u0073'),
    "nesting-of-values": nested(300),
    "nesting-of-json": nested(2000),
    "lone-surrogate": text("surrogate|hex escape", b'"note":"x"', b'"note":"\\udc80"'),
}

NUMBERS = {
    "bool-as-int": edit(r"Expected `int`, got `bool` - at `\$.step`", put("step", True)),
    "null-as-int": edit(r"Expected `int`, got `null` - at `\$.step`", put("step", None)),
    "text-as-int": edit(r"Expected `int`, got `str` - at `\$.world_size`", put("world_size", "2")),
    "float-as-int": text("not canonical|Expected `int`", b'"step":7', b'"step":7.0'),
    "fraction": edit("Expected `int`, got `float`", put("step", 7.5)),
    "negative": edit("Expected `int` >= 0", put("step", -1)),
    "2-to-the-63": edit("Expected `int` <= 9223372036854775807", put("step", 1 << 63)),
    "5000-digits": text(r"out of range - at `\$.step`", b'"step":7', b'"step":' + b"9" * 5000),
    "value-of-5000-digits": text(r"out of range - at `\$.objects", b'"n":1', b'"n":' + b"9" * 5000),
    "nan": text("malformed", b'"n":1', b'"n":NaN'),
    "infinity": text("malformed", b'"n":1', b'"n":-Infinity'),
    "1e400": text("Number out of range", b'"n":1', b'"n":1e400'),
    "value-of-2-to-the-63": text("values: an integer beyond 64 bits", b'"n":1', b'"n":%d' % (1 << 63)),
    "negative-value": text("values: an integer beyond 64 bits", b'"n":1', b'"n":-%d' % ((1 << 63) + 1)),
}

SCHEMA = {
    "format": edit("format: 'zip' is not 'shardckpt'", put("format", "zip")),
    "version": Case(lambda: edited(put("version", 2)), "has format version 2", UnsupportedVersion),
    "version-0": Case(lambda: edited(put("version", 0)), "has format version 0", UnsupportedVersion),
    "feature": Case(lambda: edited(put("features", ["fast\x1b[2J"])), r"'fast\\x1b\[2J'", UnsupportedVersion),
    "features": Case(lambda: edited(put("features", [f"f{n}" for n in range(300)])), "'f0', 'f1',", UnsupportedVersion),
    "unknown-key": edit("unknown field `x`", put("x", 1)),
    "unknown-key-of-a-mesh": edit(r"unknown field `x` - at `\$.meshes", put("meshes", 0, "x", 1)),
    "unknown-key-of-a-layout": edit(r"unknown field `x` - at `\$.layouts", put("layouts", 0, "x", 1)),
    "unknown-key-of-a-tensor": edit(r"unknown field `x` - at `\$.tensors", put("tensors", "flat", "x", 1)),
    "unknown-key-of-a-file": edit(r"unknown field `x` - at `\$.files", put("files", 1, "x", 1)),
    "unknown-key-of-metrics": edit(r"unknown field `x` - at `\$.metrics", put("metrics", "x", 1)),
    "unknown-key-that-steers": edit(r"unknown field `\\x1b\]0;owned\\x07`", put("\x1b]0;owned\x07", 1)),
    "missing-key": edit("missing required field `files`", drop("files")),
    "block-size-0": edit("block_size: 0 is no power of two", put("block_size", 0)),
    "block-size-odd": edit("block_size: 65537 is", put("block_size", BLOCK + 1)),
    "block-size-huge": edit("block_size: 4611686018427387904 is", put("block_size", 1 << 62)),
    "world-of-nobody": edit("world_size: 0", put("world_size", 0)),
    "world-of-2-to-the-40": edit("world_size: 1099511627776", put("world_size", 1 << 40)),
    "world-without-files": edit("files: 2 for 1000000 ranks", put("world_size", 1_000_000)),
}

MESHES = {
    "mesh-of-2-to-the-40": edit(r"meshes\[0\]: 1099511627776 ranks in a world of 2", put("meshes", 0, "shape", [1 << 40])),
    "mesh-that-overflows": edit(r"meshes\[0\]: shape .* overflows", put("meshes", 0, "shape", [1 << 62, 1 << 62])),
    "mesh-of-nobody": edit("0 ranks in a world of 2", put("meshes", 0, "shape", [0])),
    "mesh-of-17-dims": edit(
        r"meshes\[0\]: 17 dimensions", put("meshes", 0, {"shape": [2] + [1] * 16, "strides": [1] + [0] * 16})
    ),
    "mesh-of-rank-2": edit("rank 2 in a world of 2", put("meshes", 0, "start", 1)),
    "mesh-of-one-rank-twice": edit("do not fill the shape, or repeat", put("meshes", 0, "strides", [0])),
    "mesh-strides": edit("one stride per dimension", put("meshes", 0, "strides", [1, 1])),
    "layout-without-mesh": edit(r"layouts\[0\]: mesh 9 does not exist", put("layouts", 0, "mesh", 9)),
    "placement": edit("'S-1' is not a placement", put("layouts", 0, "placements", ["S-1"])),
    "placement-off-the-tensor": edit("sharded dimension 999 of", put("layouts", 0, "placements", ["S999"])),
    "placements-without-dims": edit("one placement per mesh dimension", put("layouts", 0, "placements", ["R"] * 500)),
    "split-factor-0": edit("'S0/0' is not a placement", put("layouts", 0, "placements", ["S0/0"])),
    "split-factors": edit(
        r"layouts\[0\]: shards of 99980001 pieces, where 8192",
        put("meshes", 0, {"shape": [2, 1], "strides": [1, 0]}),
        put("layouts", 0, "placements", ["S0/9999", "S0/9999"]),
    ),
}


def many(count: int, **record: Any) -> Edit:
    def change(document: Document) -> None:
        document["tensors"].update({f"more/{n}": record for n in range(count)})

    return change


TENSORS = {
    "dtype": edit("unknown dtype 'float99'", put("tensors", "flat", "dtype", "float99")),
    "dtype-that-is-code": edit("unknown dtype '__import__'", put("tensors", "flat", "dtype", "__import__")),
    "shape-that-overflows": edit(r"tensor 'flat': shape .* overflows", put("tensors", "flat", "shape", [1 << 60, 8])),
    "empty-shape-that-overflows": edit(
        r"tensor 'more': shape .* overflows", add_tensor("more", dtype="int8", shape=[1 << 62, 1 << 62, 0], layout=0)
    ),
    "shape-of-65-dims": edit("tensor 'flat': 65 dimensions", put("tensors", "flat", "shape", [1] * 65)),
    "sum-that-overflows": edit(
        "tensors: 18446744073709551864 bytes in all overflow", many(8, dtype="uint8", shape=[1 << 61], layout=0)
    ),
    "layouts-0": edit("tensor 'flat': exactly one layout", drop("tensors", "flat", "flat")),
    "layouts-2": edit("tensor 'flat': exactly one layout", put("tensors", "flat", "layout", 0)),
    "layout-that-is-not-there": edit("layout 9 does not exist", put("tensors", "model/cut", "layout", 9)),
    "writers-out-of-range": edit(r"writers \(2, 1\) of 2 replicas", put("tensors", "model/same", "writers", [2, 1])),
    "writers-too-many": edit(r"writers \(0, 3\) of 2 replicas", put("tensors", "model/same", "writers", [0, 3])),
    "writers-nobody": edit(r"writers \(1, 0\) of 2 replicas", put("tensors", "model/same", "writers", [1, 0])),
    "writers-of-a-shard": edit(r"writers \(1, 1\) of 1 replicas", put("tensors", "model/cut", "writers", [1, 1])),
    "flat-rank": edit("tensor 'flat': rank 2 in a world of 2", put("tensors", "flat", "flat", 1, [2, 4, 10])),
    "flat-gap": edit("leave a gap or overlap at element 4", put("tensors", "flat", "flat", 1, [1, 5, 10])),
    "flat-overlap": edit("leave a gap or overlap at element 3", put("tensors", "flat", "flat", 1, [1, 3, 10])),
    "flat-end": edit("cover 9 of 10 elements", put("tensors", "flat", "flat", 1, [1, 4, 9])),
    "flat-outside": edit(r"range \[4, 9223372036854775807\) of 10", put("tensors", "flat", "flat", 1, [1, 4, (1 << 63) - 1])),
    "flat-backwards": edit(r"range \[4, 0\) of 10", put("tensors", "flat", "flat", 0, [0, 4, 0])),
    "flat-of-one-rank-twice": edit("'flat': a rank has two ranges", put("tensors", "flat", "flat", 1, [0, 4, 10])),
    "box-rank": edit("tensor 'boxes': rank 9 in a world of 2", put("tensors", "boxes", "boxes", 1, 0, 9)),
    "box-outside": edit("box of rank 1 is outside", put("tensors", "boxes", "boxes", 1, [1, [0, 3], [2, 2]])),
    "box-dims": edit("box of rank 1 has other dimensions", put("tensors", "boxes", "boxes", 1, [1, [0], [2]])),
    "box-gap": edit("boxes do not cover", put("tensors", "boxes", "boxes", 1, [1, [0, 3], [2, 1]])),
    "box-overlap": edit(r"boxes at \(0, 0\) and \(0, 1\) overlap", put("tensors", "boxes", "boxes", 1, [1, [0, 1], [2, 2]])),
    "box-of-one-rank-twice": edit("a rank has two boxes", put("tensors", "boxes", "boxes", 1, [0, [0, 2], [2, 2]])),
    "alias-of-nothing": edit("an alias of 'none'", put("tensors", "tied", "alias", "none")),
    "alias-of-itself": edit("an alias of 'tied'", put("tensors", "tied", "alias", "tied")),
    "alias-cycle": edit("an alias of 'tied'", put("tensors", "tied", "alias", "loop"), add_tensor("loop", alias="tied")),
    "alias-of-an-alias": edit("'again': an alias of 'tied'", add_tensor("again", alias="tied")),
    "alias-of-a-value": edit("an alias of 'n', which is no tensor", put("tensors", "tied", "alias", "n")),
    "alias-with-fields": edit("an alias with fields of its own", put("tensors", "tied", "shape", [4, 3])),
    "own-of-some-ranks": edit("shapes for some ranks only", put("tensors", "list/0", "per_rank", [[2], None, [2]])),
    "own-that-overflows": edit("overflow", put("tensors", "value", "per_rank", [[1 << 61]])),
    "value-of-floats": edit("tensor 'value': no value", put("tensors", "value", "dtype", "float32")),
    "replicated": edit("only for the exchange between ranks", put("tensors", "flat", {"dtype": "int8", "replicated": True})),
}

NAMES = {
    "name-empty": edit("tensors: '' is no name", add_tensor("", alias="flat")),
    "name-with-empty-key": edit("tensors: 'a//b' is no name", add_tensor("a//b", alias="flat")),
    "name-with-newline": edit(r"tensors: 'a\\nb' is no name", add_tensor("a\nb", alias="flat")),
    "name-with-escape": edit(r"tensors: 'a\\x1b\[31m' is no name", add_tensor("a\x1b[31m", alias="flat")),
    "name-with-nul": edit(r"tensors: 'a\\x00' is no name", add_tensor("a\0", alias="flat")),
    "name-with-tilde": edit("tensors: 'a~2' is no name", add_tensor("a~2", alias="flat")),
    "name-of-65-keys": edit("tensors: 'k/k/k.* is no name", add_tensor("/".join("k" * 65), alias="flat")),
    "name-of-a-value": edit(r"objects: '\\x9bm' is no name", put("objects", "\x9bm", 1)),
    "name-of-a-container": edit("containers: '/' is no name", put("containers", "/", 1)),
    "name-of-both": edit("tensor 'flat': a value has the same name", put("objects", "flat", 1)),
    "name-below-a-leaf": edit("'flat' is a leaf, and other names are below it", put("objects", "flat/x", 1)),
}

RANK_1 = "rank-00001-0123456789abcdef.safetensors"


def file_name(name: str) -> Case:
    return edit(r"files\[1\]: (file name|'rank)", put("files", 1, "name", name))


FILES = {
    "file-up": file_name(f"../{RANK_1}"),
    "file-in-a-directory": file_name(f"x/{RANK_1}"),
    "file-absolute": file_name("/dev/zero"),
    "file-backslash": file_name(f"..\\{RANK_1}"),
    "file-dots": file_name(".."),
    "file-empty": file_name(""),
    "file-nul": file_name(f"{RANK_1}\0"),
    "file-newline": file_name(f"{RANK_1}\n"),
    "file-escape": file_name("rank-00001-\x1b[2J.safetensors"),
    "file-case-twin": file_name(RANK_1.upper()),
    "file-case-twin-of-hex": file_name("rank-00001-0123456789ABCDEF.safetensors"),
    "file-other-digits": file_name("rank-٠٠٠٠١-0123456789abcdef.safetensors"),
    "file-too-long": file_name("rank-" + "0" * 400 + "1-0123456789abcdef.safetensors"),
    "file-of-another-rank": edit("is not of attempt", put("files", 1, "name", RANK_1.replace("00001", "00000"))),
    "file-of-another-attempt": edit("is not of attempt", put("attempt", "f" * 16)),
    "attempt-with-a-path": edit("is not of attempt", put("attempt", "../../etc")),
    "files-swapped": edit(r"files\[0\]: rank 1 in the place of rank 0", lambda d: d["files"].reverse()),
    "files-1": edit("files: 1 for 2 ranks", lambda d: d["files"].pop()),
    "files-3": edit("files: 3 for 2 ranks", lambda d: d["files"].append(d["files"][0])),
    "file-size": edit(r"files\[1\]: 4097 bytes where the tensors need", put("files", 1, "size", 4097)),
    "file-size-huge": edit(r"files\[1\]: 9223372036854775807 bytes where", put("files", 1, "size", (1 << 63) - 1)),
    "data-inside-the-header": edit(r"files\[1\]: data at byte 0", put("files", 1, "data", 0)),
    "data-off-the-grid": edit("data at byte 4097", put("files", 1, "data", 4097)),
    "data-after-a-huge-header": edit("data at byte 1099511627776", put("files", 1, "data", 1 << 40)),
    "header-digest-length": edit("header digest is not 16 hex digits", put("files", 1, "header", "0" * 15)),
    "header-digest-letters": edit("header digest is not 16 hex digits", put("files", 1, "header", "G" * 16)),
    "digests-0": edit("0 digests for 1 blocks", put("files", 1, "digests", "")),
    "digests-2": edit("2 digests for 1 blocks", put("files", 1, "digests", base64.b64encode(b"8" * 16).decode())),
    "digests-half": edit("are not whole ones", put("files", 1, "digests", base64.b64encode(b"8" * 4).decode())),
    "digests-letters": edit("digests are not base64", put("files", 1, "digests", "a b\x1b")),
}

VALUES = {
    "value-tag": value("unknown tag 'pickle'", {"$": "pickle", "v": "gASVAAAA"}),
    "value-tag-list": value("a tagged value has just", {"$": [], "v": "x"}),
    "value-extra": value("a tagged value has just", {"$": "int", "v": "0x1", "x": 1}),
    "value-int-that-fits": value("bad 'int': it fits 64 bits", {"$": "int", "v": "0x1"}),
    "value-int-letters": value("bad 'int'", {"$": "int", "v": "0x" + "g" * 40}),
    "value-int-decimal": value("'int' is not in its canonical form", {"$": "int", "v": "9" * 5000}),
    "value-float": value("bad 'float'", {"$": "float", "v": "one"}),
    "value-float-finite": value("'float' is not in its canonical form", {"$": "float", "v": "1.5"}),
    "value-bytes": value("bad 'bytes'", {"$": "bytes", "v": "a"}),
    "value-bytes-loose": value("'bytes' is not in its canonical form", {"$": "bytes", "v": "QUF="}),
    "value-str": value("bad 'str'", {"$": "str", "v": "QQ=="}),
    "value-str-plain": value("'str' is not in its canonical form", {"$": "str", "v": "QQA="}),
    "value-dtype": value("bad 'dtype': 'load' is no dtype", {"$": "dtype", "v": "load"}),
    "value-dtype-module": value("bad 'dtype': 'onnx' is no dtype", {"$": "dtype", "v": "onnx"}),
    "value-dtype-dunder": value("bad 'dtype': '__class__' is no dtype", {"$": "dtype", "v": "__class__"}),
    "value-device": value("bad 'device'", {"$": "device", "v": "cuda:99999999999999999999"}),
    "value-size": value("'size' of no integers", {"$": "size", "v": [-1]}),
    "value-dict-pairs": value("'dict' without pairs", {"$": "dict", "v": [[1]]}),
    "value-dict-key": value("a list cannot be a key", {"$": "dict", "v": [[[], 1]]}),
    "value-dict-twice": value("a key comes twice", {"$": "dict", "v": [[1, 1], [1, 2]]}),
    "value-dict-of-a-huge-key": value(
        "a key comes twice", {"$": "dict", "v": [[{"$": "int", "v": "0x" + "f" * 3600}, n] for n in range(2)]}
    ),
    "value-nesting": value("value 'n': nested deeper than 64 levels", json.loads("[" * 100 + "]" * 100)),
    "container-value": edit("'list' is not a container", put("containers", "list", 1)),
    "container-kind": edit("unknown kind of container 'set'", put("containers", "list", "kind", "set")),
    "container-size": edit("a container without its size", put("containers", "list", "v", -1)),
    "container-size-huge": edit("a container without its size", put("containers", "list", "v", 1 << 40)),
    "container-size-bool": edit("a container without its size", put("containers", "list", "v", True)),
    "container-too-short": edit("container 'list' has no key '1'", put("containers", "list", "v", 1)),
    "container-keys": edit(
        "a key that comes twice", put("containers", "list", {"$": "container", "kind": "dict", "v": [1, 1]})
    ),
    "container-more": edit("has just", put("containers", "list", "x", 1)),
}

METRICS = {
    "metrics-phase": edit("Invalid enum value|invalid", put("metrics", "microseconds", {"sleep": "AAAA"})),
    "metrics-none": edit("metrics: without any phase", put("metrics", "microseconds", {})),
    "metrics-of-commit": edit(r"that manifests do not have: \['commit'\]", put("metrics", "microseconds", {"commit": "AA=="})),
    "metrics-length": edit("3 bytes where 8 are needed", put("metrics", "microseconds", {"write": "AAAA"})),
    "metrics-letters": edit("metrics of 'write': not base64", put("metrics", "microseconds", {"write": "!"})),
}


# ---- caps that only a long manifest reaches


def _wide(ranks: int) -> Edit:
    """A world of many ranks that have nothing."""

    def change(document: Document) -> None:
        names = [f"rank-{rank:05d}-{document['attempt']}.safetensors" for rank in range(ranks)]
        empty = {"size": 4096, "data": 4096, "header": "0" * 16, "digests": ""}
        document["files"] = [{"rank": rank, "name": name, **empty} for rank, name in enumerate(names)]
        document["world_size"] = ranks
        document["tensors"], document["containers"] = {}, {}
        document.pop("metrics")

    return change


def _stripes(rows: int, columns: int) -> list[Any]:
    """An exact cover: upright stripes beside level ones, so that many are side by side whichever way one looks."""
    upright = [[column, [0, column], [rows, 1]] for column in range(columns)]
    return upright + [[columns + row, [row, columns], [1, columns]] for row in range(rows)]


def long(message: str, *edits: Edit) -> Case:
    return Case(lambda: edited(*edits), message, is_small=False)


LONG = {
    "meshes-of-millions": long(
        r"meshes\[1024\]: meshes of more than 4194304 ranks in all",
        _wide(4096),
        put("meshes", [{"shape": [4096], "strides": [1]}] * 1100),
    ),
    "layouts-beyond-count": long(
        "607 distinct layouts are too much to plan with",
        put("layouts", 0, "placements", ["S0/8192"]),
        lambda d: d["tensors"].update({f"more/{n}": {"dtype": "int8", "shape": [n, 0], "layout": 0} for n in range(600)}),
    ),
    "boxes-side-by-side": long(
        "boxes, too many of them side by side",
        _wide(4096),
        add_tensor("stripes", dtype="int8", shape=[1500, 1000], boxes=_stripes(1500, 500)),
    ),
}


CASES: dict[str, Case] = {
    **TEXT,
    **NUMBERS,
    **SCHEMA,
    **MESHES,
    **TENSORS,
    **NAMES,
    **FILES,
    **VALUES,
    **METRICS,
    **LONG,
}
