# SPDX-License-Identifier: Apache-2.0
"""Random changes to manifests, as documents and as text, for Hypothesis and for the fuzzer."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

Path = tuple[Any, ...]

NUMBERS = [0, 1, 2, 3, 4, 255, 4096, 65536, 1 << 31, 1 << 32, 1 << 61, (1 << 63) - 1, 1 << 63, 1 << 64, -1, 1.5, 1e300]
TEXTS = [
    "",
    "R",
    "S0",
    "S1",
    "S0/2",
    "S0/8192",
    "flat",
    "model/cut",
    "tied",
    "/",
    "~2",
    "\x1b[2J",
    "int8",
    "complex128",
    "AAAA",
]
TAGGED: list[Any] = [
    {"$": "int", "v": "0x10000000000000000"},
    {"$": "float", "v": "nan"},
    {"$": "bytes", "v": "QQ=="},
    {"$": "str", "v": "gNw="},
    {"$": "dict", "v": [[1, 2]]},
    {"$": "counter", "v": [["a", 2]]},
    {"$": "size", "v": [1, 2]},
    {"$": "device", "v": "cpu"},
    {"$": "container", "kind": "dict", "v": [0, "1", None]},
    {"$": "container", "kind": "tuple", "v": 3},
]
OTHERS: list[Any] = [None, True, False, [], {}, [0], [[]], {"": 0}, *TAGGED]


def places(document: Any, path: Path = ()) -> list[Path]:
    """The path of each part of a document."""
    found = [path] if path else []
    items = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


def at(document: Any, path: Path) -> Any:
    """The part at a path."""
    for key in path:
        document = document[key]
    return document


def mutate(document: Any, random: Random) -> None:
    """Change one part of a document."""
    found = places(document)
    if not found:
        return
    path = random.choice(found)
    holder, key = at(document, path[:-1]), path[-1]
    match random.randrange(7):
        case 0:
            del holder[key]
        case 1:
            holder[key] = _other(random)
        case 2:
            holder[key] = _nudged(holder[key], random)
        case 3:
            _duplicate(holder, key, random)
        case 4:
            other = random.choice(found)
            holder[key] = copy.deepcopy(at(document, other))
        case 5:
            _swap(document, path, random.choice(found))
        case _:
            if isinstance(holder, dict):
                holder[random.choice([*TEXTS, *map(str, found[-1])])] = holder.pop(key)


def _other(random: Random) -> Any:
    kinds: list[list[Any]] = [NUMBERS, TEXTS, OTHERS]
    return copy.deepcopy(random.choice(random.choice(kinds)))


def _nudged(value: Any, random: Random) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return _other(random)
    if isinstance(value, str):
        cut = random.randrange(len(value) + 1)
        return value[:cut] + random.choice(["", *TEXTS]) + value[cut + random.randrange(2) :]
    return random.choice([value + 1, value - 1, value * 2, -value, value + 65536, value * value])


def _duplicate(holder: Any, key: Any, random: Random) -> None:
    if isinstance(holder, list):
        holder.insert(random.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
    else:
        holder[f"{key}{random.choice(['', '/', '/x', '2'])}"] = copy.deepcopy(holder[key])


def _swap(document: Any, one: Path, other: Path) -> None:
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        # one holds the other
        return
    a, b = at(document, one[:-1]), at(document, other[:-1])
    a[one[-1]], b[other[-1]] = b[other[-1]], a[one[-1]]


def mutate_text(text: bytes, random: Random) -> bytes:
    """Change a few bytes of a text."""
    changed = bytearray(text)
    for _ in range(random.randrange(1, 5)):
        start = random.randrange(len(changed) + 1)
        stop = min(len(changed), start + random.choice([0, 1, 1, 2, 8, 64]))
        new = random.choice(
            [b"", b'"', b",", b"0", b"9" * 30, b"[" * 20, b"\xff", b"\x00", b"{", b"}", b"\\u0000", b"e9", b"-"]
        )
        if random.randrange(4) == 0:
            origin = random.randrange(len(text) + 1)
            new = text[origin : origin + random.randrange(1, 100)]
        changed[start:stop] = new
    return bytes(changed)
