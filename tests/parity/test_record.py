# SPDX-License-Identifier: Apache-2.0
"""The record of a parity: whatever was not written by a save of just this checkpoint is refused, and does no harm."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.errors import InvalidParity, MissingFile, StoreError
from shardckpt.manifest import seal
from shardckpt.parity.record import PARITY_LIMIT, Parity, find_parity, parse_parity
from shardckpt.store import LocalStore
from shardckpt.validate import Checkpoint
from tests.parity.jobs import load, lose, opened, parity_of, rank_file
from tests.ranks import RankErrors, RankPool

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="session")
def protected(originals: dict[int, Path]) -> tuple[Checkpoint, bytes]:
    """A checkpoint with two groups of two ranks, and the bytes of its record."""
    return opened(originals[2]).checkpoint, next(originals[2].glob("parity-*.json")).read_bytes()


def changed(data: bytes, change: Change) -> bytes:
    """A record with a change, and with the checksum that belongs to it."""
    document = msgspec.json.decode(data)
    change(document)
    return seal(msgspec.json.encode(document | {"checksum": ""}))


def file(document: dict[str, Any], group: int = 0, number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = document["groups"][group]["files"][number]
    return found


HOSTILE: dict[str, tuple[Change, str]] = {
    "format": (lambda d: d.update(format="shardckpt"), "format, version or method"),
    "version": (lambda d: d.update(version=2), "format, version or method"),
    "method": (lambda d: d.update(method="sum"), "format, version or method"),
    "version as bool": (lambda d: d.update(version=True), "Expected `int`"),
    "another attempt": (lambda d: d.update(attempt="0" * 16), "attempt"),
    "another manifest": (lambda d: d.update(manifest="0" * 64), "another SHA-256"),
    "no groups": (lambda d: d.update(groups=[]), "4 ranks, each in one"),
    "a rank in two groups": (lambda d: d["groups"][1].update(ranks=[0, 3]), "4 ranks, each in one"),
    "a rank left out": (lambda d: d["groups"][1].update(ranks=[1]), "4 ranks, each in one"),
    "a rank too many": (lambda d: d["groups"][1].update(ranks=[1, 3, 4]), "4 ranks, each in one"),
    "a group without ranks": (lambda d: d["groups"].append({"ranks": [], "files": []}), "no ranks"),
    "ranks out of order": (lambda d: d["groups"][0].update(ranks=[2, 0]), "not in order"),
    "other groups": (lambda d: (d["groups"][0].update(ranks=[0, 1]), d["groups"][1].update(ranks=[2, 3])), "bytes"),
    "a slice left out": (lambda d: d["groups"][0]["files"].pop(), "1 slices"),
    "a slice too many": (lambda d: d["groups"][0]["files"].append(file(d)), "3 slices"),
    "slices swapped": (lambda d: d["groups"][0]["files"].reverse(), "file name"),
    "a path": (lambda d: file(d).update(name="../../etc/passwd"), "file name"),
    "a rank file": (lambda d: file(d).update(name="manifest.json"), "file name"),
    "a size": (lambda d: file(d).update(size=file(d)["size"] + 1), "are needed"),
    "a negative size": (lambda d: file(d).update(size=-1), "int"),
    "a huge size": (lambda d: file(d).update(size=1 << 62), "are needed"),
    "no base64": (lambda d: file(d).update(digests="*"), "not base64"),
    "half a digest": (lambda d: file(d).update(digests="AAAA"), "not whole ones"),
    "a digest too many": (lambda d: file(d).update(digests=file(d)["digests"][:-1] + "AAAAAAAAAAA="), "digests"),
    "an unknown key": (lambda d: d.update(more=1), "unknown field"),
    "a key left out": (lambda d: d.pop("method"), "missing required field"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_record_that_does_not_fit_is_refused(protected: tuple[Checkpoint, bytes], name: str) -> None:
    checkpoint, data = protected
    change, message = HOSTILE[name]
    with pytest.raises(InvalidParity, match=message):
        parse_parity(changed(data, change), "", checkpoint)


def test_the_record_of_a_save_fits(protected: tuple[Checkpoint, bytes]) -> None:
    checkpoint, data = protected
    parity = parse_parity(data, "step-1/", checkpoint)
    assert [group.ranks for group in parity.record.groups] == [(0, 2), (1, 3)]
    assert changed(data, lambda document: None) == data
    assert parity.group_of == {0: 0, 2: 0, 1: 1, 3: 1}
    assert [body.name.rpartition("-")[0] for body in parity.bodies(0)] == [
        *("step-1/rank-00000", "step-1/rank-00002"),
        *("step-1/parity-00000-00000", "step-1/parity-00000-00001"),
    ]


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"null", b"\xff" * 100, b"[" * 100_000, b'{"a":1,"a":1}', b"\xef\xbb\xbf{}"],
    ids=lambda data: repr(data[:6]),
)
def test_what_is_no_record_is_refused(protected: tuple[Checkpoint, bytes], data: bytes) -> None:
    for document in (data, seal(data)):
        with pytest.raises(InvalidParity):
            parse_parity(document, "", protected[0])


def test_each_flipped_bit_and_each_cut_is_refused(protected: tuple[Checkpoint, bytes]) -> None:
    checkpoint, data = protected
    for at in range(len(data)):
        with pytest.raises(InvalidParity):
            parse_parity(data[:at], "", checkpoint)
        for bit in range(8):
            with pytest.raises(InvalidParity):
                parse_parity(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :], "", checkpoint)
    with pytest.raises(InvalidParity):
        parse_parity(data + b" ", "", checkpoint)


@given(
    document=st.recursive(st.none() | st.integers() | st.text(max_size=5) | st.booleans(), lambda e: st.lists(e, max_size=4)),
    data=st.data(),
)
def test_any_change_gives_a_parity_or_is_refused(
    protected: tuple[Checkpoint, bytes], document: Any, data: st.DataObject
) -> None:
    checkpoint, good = protected

    def change(record: dict[str, Any]) -> None:
        place: Any = record
        while isinstance(place, dict | list) and place:
            key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if not isinstance(place[key], dict | list) or data.draw(st.booleans()):
                place[key] = document
                return
            place = place[key]

    with contextlib.suppress(InvalidParity):
        assert isinstance(parse_parity(changed(good, change), "", checkpoint), Parity)


def test_an_invalid_record_is_told_of_when_a_file_is_lost(ranks: RankPool, copy: Callable[[int], Path]) -> None:
    path = copy(2)
    record = next(path.glob("parity-*.json"))
    record.write_bytes(changed(record.read_bytes(), lambda document: document.update(method="sum")))
    lose(rank_file(path, 3))
    with pytest.raises(RankErrors) as caught:
        ranks.run(2, load, str(path))
    for error in caught.value.outcomes:
        assert isinstance(error, MissingFile)
        assert "cannot be rebuilt from parity: invalid parity record: it is of a format, version or method" in error.message


def test_the_record_of_another_save_of_the_same_state_is_refused(originals: dict[int, Path]) -> None:
    checkpoint = opened(originals[2]).checkpoint
    with pytest.raises(InvalidParity, match="attempt"):
        parse_parity(next(originals[3].glob("parity-*.json")).read_bytes(), "", checkpoint)


def test_a_huge_record_is_not_read(copy: Callable[[int], Path]) -> None:
    path = copy(2)
    record = next(path.glob("parity-*.json"))
    with record.open("r+b") as stream:
        stream.truncate(PARITY_LIMIT + 1)
    with pytest.raises(StoreError, match="are read at most"):
        find_parity(LocalStore(path), "", opened(path).checkpoint)


def test_a_record_that_is_a_link_is_refused(copy: Callable[[int], Path]) -> None:
    path = copy(2)
    assert parity_of(path).files
    record = next(path.glob("parity-*.json"))
    record.rename(path.parent / "elsewhere")
    record.symlink_to(path.parent / "elsewhere")
    with pytest.raises(StoreError):
        find_parity(LocalStore(path), "", opened(path).checkpoint)
