# SPDX-License-Identifier: Apache-2.0
"""How ranks come to know each other's tables: digests first, then only the distinct tables, each once.

Messages at rank 0 grow with the ranks, tables with the kinds of ranks; nothing grows with their product. When no digest has
changed since the last time, one round is all.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from .coordinate import Coordinator
from .errors import ReplicaDivergence
from .layout import Ints
from .manifest import encode_canonical

_PACK = msgspec.msgpack.Encoder()


@dataclass(frozen=True, slots=True)
class Statement:
    """All that one rank says of its state, apart from the bytes of tensors."""

    table: bytes
    """From `shardckpt.tables.encode_table`."""
    shapes: dict[str, Ints]
    """Of its per-rank tensors."""
    values: dict[str, Any]
    """Its replicated values, encoded, and anything else that must be equal on each rank that has it. Keys are ``kind:name``."""
    notice: bytes = b""
    """On rank 0: something to tell all ranks."""


class _Introduction(msgspec.Struct):
    table: bytes
    values: bytes
    shapes: dict[str, tuple[int, ...]]
    known: bytes
    notice: bytes


class _Outline(msgspec.Struct):
    key: bytes
    table_of: list[int]
    table_senders: list[int]
    value_senders: list[int]
    shapes: list[dict[str, tuple[int, ...]]]
    known: bool
    nonce: str
    notice: bytes


class _Contribution(msgspec.Struct):
    table: bytes
    values: bytes


@dataclass(frozen=True, slots=True)
class Exchanged:
    """What all ranks know after an exchange."""

    nonce: str
    """Random hex digits, the same on all ranks and new in each exchange."""
    key: bytes
    """Digest of all tables and shapes; equal when, and only when, the plan is the same."""
    tables: tuple[bytes, ...] | None
    """The distinct tables; None when ``key`` is the one that every rank knew already."""
    table_of: tuple[int, ...]
    """The number of each rank's table."""
    shapes: tuple[dict[str, Ints], ...]
    """Per-rank shapes by rank."""
    values: dict[str, Any]
    """On rank 0: the values of all ranks together. Elsewhere: this rank's."""
    notice: bytes
    """What rank 0 had to tell."""


def exchange(coordinator: Coordinator, label: str, make_statement: Callable[[], Statement], known: bytes = b"") -> Exchanged:
    """Make all ranks know all tables; ``known`` is the key of the plan that this rank still has.

    An error in ``make_statement`` on any rank is raised on all. Raises `ReplicaDivergence` when a value differs between ranks.
    """
    statement: list[Statement] = []

    def introduce() -> bytes:
        statement.append(make_statement())
        mine = statement[0]
        values = hashlib.sha256(encode_canonical(mine.values)).digest()
        return _PACK.encode(_Introduction(hashlib.sha256(mine.table).digest(), values, mine.shapes, known, mine.notice))

    outline = msgspec.msgpack.decode(coordinator.round(f"{label}: tables", introduce, _make_outline), type=_Outline)
    mine = statement[0]
    table_of, shapes = tuple(outline.table_of), tuple(outline.shapes)
    if len(shapes) == 1:
        shapes *= coordinator.world_size
    if outline.known and len(outline.value_senders) == 1:
        return Exchanged(outline.nonce, outline.key, None, table_of, shapes, mine.values, outline.notice)

    merged = dict(mine.values)

    def contribute() -> bytes:
        sends_table = coordinator.rank in outline.table_senders and not outline.known
        sends_values = coordinator.rank in outline.value_senders and len(outline.value_senders) > 1
        return _PACK.encode(
            _Contribution(mine.table if sends_table else b"", encode_canonical(mine.values) if sends_values else b"")
        )

    def assemble(payloads: list[bytes]) -> bytes:
        contributions = [msgspec.msgpack.decode(payload, type=_Contribution) for payload in payloads]
        if len(outline.value_senders) > 1:
            merged.update(_merge_values([(r, contributions[r].values) for r in outline.value_senders]))
        return _PACK.encode([contributions[rank].table for rank in outline.table_senders])

    tables = msgspec.msgpack.decode(
        coordinator.round(f"{label}: distinct tables", contribute, assemble), type=tuple[bytes, ...]
    )
    return Exchanged(outline.nonce, outline.key, None if outline.known else tables, table_of, shapes, merged, outline.notice)


def _make_outline(payloads: list[bytes]) -> bytes:
    introductions = [msgspec.msgpack.decode(payload, type=_Introduction) for payload in payloads]
    table_of, table_senders = _number([i.table for i in introductions])
    _, value_senders = _number([i.values for i in introductions])
    shapes = [i.shapes for i in introductions]
    if all(other == shapes[0] for other in shapes):
        shapes = shapes[:1]
    tables = [introductions[rank].table for rank in table_senders]
    key = hashlib.sha256(_PACK.encode([tables, table_of, [sorted(s.items()) for s in shapes]])).digest()
    known = all(i.known == key for i in introductions)
    nonce = secrets.token_hex(8)
    return _PACK.encode(_Outline(key, table_of, table_senders, value_senders, shapes, known, nonce, introductions[0].notice))


def _number(items: Sequence[bytes]) -> tuple[list[int], list[int]]:
    """The number of each item among the distinct ones, and the position where each of those comes first."""
    first: dict[bytes, int] = {}
    numbers, positions = [], []
    for position, item in enumerate(items):
        if item not in first:
            first[item] = len(first)
            positions.append(position)
        numbers.append(first[item])
    return numbers, positions


def _merge_values(contributions: list[tuple[int, bytes]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    owner: dict[str, int] = {}
    diverging: dict[str, list[int]] = {}
    for rank, data in contributions:
        for name, value in msgspec.json.decode(data).items():
            if owner.setdefault(name, rank) == rank:
                merged[name] = value
            elif encode_canonical(merged[name]) != encode_canonical(value):
                diverging.setdefault(name, [owner[name]]).append(rank)
    if diverging:
        names = [key.partition(":")[2] for key in sorted(diverging)]
        ranks = diverging[min(diverging)]
        raise ReplicaDivergence(
            f"value {names[0]!r} differs between ranks, for example {ranks}"
            + (f" (and so do {len(diverging) - 1} other values)" if len(diverging) > 1 else "")
            + ". A replicated value has to be equal on all ranks; one that is meant to differ goes into PerRank(...)",
            names=names,
            ranks=ranks,
        )
    return merged
