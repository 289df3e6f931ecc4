# SPDX-License-Identifier: Apache-2.0
"""How things are printed: harmless names, sizes, ages, tables that are never cut."""

from __future__ import annotations

import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shardckpt
from shardckpt.cli.output import age_text, count_text, printable, size_text
from shardckpt.manifest import MANIFEST_NAME, Manifest, encode_manifest
from tests.cli.run import run


@given(st.text())
def test_nothing_that_steers_a_terminal_is_printed(text: str) -> None:
    assert printable(text).isprintable()
    if text.isprintable():
        assert printable(text) == text


def test_escapes_say_what_was_there() -> None:
    assert printable("a\x1b[31mb\n\u202e\ud800é") == "a\\x1b[31mb\\n\\u202e\\ud800é"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (2_900_000_000, "2.9 GB"), (999_999, "1 MB"), (5 * 10**15, "5 PB")],
)
def test_sizes(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text


def test_ages() -> None:
    now = datetime.now(timezone.utc)
    assert age_text((now - timedelta(hours=5)).isoformat(timespec="milliseconds"), 0) == "5 h"
    assert age_text((now - timedelta(days=3)).isoformat(), 0) == "3 d"
    assert age_text((now + timedelta(hours=1)).isoformat(), 0) == "0 s"
    assert age_text(None, time.time() - 600) == "10 min"
    assert age_text("yesterday", time.time() - 600) == "10 min"


def test_counts() -> None:
    assert [count_text(n, "file") for n in (0, 1, 1234)] == ["0 files", "1 file", "1,234 files"]


def test_long_names_are_whole_when_piped_and_brackets_are_text(tmp_path: Path) -> None:
    name = "[bold]" + "x" * 300 + " :smile: [/red]"
    shardckpt.save(tmp_path, {"model": {name.replace("/", "|"): torch.ones(2)}})
    shown = run("show", tmp_path).out
    assert f"model/{name.replace('/', '|')}  float32" in shown


def test_names_of_a_hostile_manifest_are_escaped(tmp_path: Path) -> None:
    shardckpt.save(tmp_path, {"victim": torch.ones(2), "value": 1})
    path = tmp_path / MANIFEST_NAME
    text = path.read_bytes().replace(b'"victim"', b'"v\\u200fm"').replace(b'"value"', b'"v\\u202elue"')
    path.write_bytes(encode_manifest(msgspec.json.decode(text, type=Manifest)))
    for arguments in (["show", "--values"], ["show", "--json"], ["digest", "--tensors"]):
        done = run(*arguments, tmp_path)
        assert all(line.isprintable() for line in done.out.splitlines()), arguments
        assert "v\\u200fm" in done.out
