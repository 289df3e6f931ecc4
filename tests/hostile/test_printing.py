# SPDX-License-Identifier: Apache-2.0
"""Nothing that a checkpoint or a file name holds can steer the terminal of who looks at it, or who sees an error of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt
from shardckpt.errors import CheckpointError
from shardckpt.manifest import MANIFEST_NAME
from tests.cli.run import Ran, run
from tests.hostile.base import encoded
from tests.maintain.make import flip, rank_file

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\n\u202e"
"""Sets a title, clears the screen, colors, breaks the line, and turns the direction of writing."""
SNEAKY = "turn\u202earound"
"""A name that no save refuses, with a character that turns the direction of writing."""


def disguise(path: Path) -> None:
    """Put what steers terminals wherever a manifest takes text."""
    manifest = path / MANIFEST_NAME
    document = json.loads(manifest.read_bytes())
    document["metadata"] = {EVIL: EVIL, "deep": [EVIL]}
    document["objects"] = {f"value{SNEAKY}": EVIL, "same": {EVIL: EVIL}}
    document["tensors"][SNEAKY] = document["tensors"].pop("victim")
    for field in ("created", "torch", "shardckpt"):
        document[field] = EVIL
    manifest.write_bytes(encoded(document))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root of two steps that are made to steer terminals, and of a failed save with such an error."""
    place = tmp_path / "root"
    with shardckpt.Checkpointer(place) as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"victim": torch.full((4,), float(step)), "same": 0, "value": step}, wait=True)
    for path in place.glob("step-*"):
        disguise(path)
    marker = place / ".saves" / "step-00000003-0123456789abcdef.failed"
    marker.parent.mkdir(exist_ok=True)
    marker.write_text(json.dumps({"error": EVIL, "message": EVIL}))
    return place


def harmless(done: Ran) -> bool:
    return all(line.isprintable() for line in (done.out + done.err).splitlines())


SHOWS = [
    ["ls"],
    ["ls", "--json"],
    ["show", "--values"],
    ["show", "--timings"],
    ["show", "--values", "--json"],
    ["digest", "--tensors"],
    ["digest", "--json"],
]


def tells(text: str) -> bool:
    return "x1b" in text or "u001b" in text or "u202e" in text


@pytest.mark.parametrize("command", SHOWS, ids=" ".join)
def test_what_commands_print(root: Path, command: list[str]) -> None:
    done = run(command[0], root, *command[1:])
    assert done.status == 0
    assert harmless(done)
    assert tells(done.out)


@pytest.mark.parametrize("option", ["--read-data", "--json"])
def test_what_verify_prints(root: Path, option: str) -> None:
    for path in root.glob("step-*"):
        flip(rank_file(path), -1)
    done = run("verify", root, "--read-data", option)
    assert done.status == 1
    assert harmless(done)
    assert tells(done.out)


def test_what_prune_prints(root: Path) -> None:
    done = run("prune", root, "--keep-last", "1", "--dry-run")
    assert done.status == 0
    assert harmless(done)


def test_what_diff_prints(root: Path) -> None:
    one, other = sorted(root.glob("step-*"))
    for option in ([], ["--json"], ["--layouts"]):
        done = run("diff", one, other, *option)
        assert harmless(done)
        assert done.status == 1
        assert "u202e" in done.out


def test_files_with_such_names(root: Path) -> None:
    os.mkfifo(root / f"step-00000002{EVIL.replace('/', '')}")
    (root / ".saves" / f"step-00000001{EVIL.replace('/', '')}").touch()
    assert harmless(run("ls", root))
    done = run("show", root / f"none{EVIL}")
    assert done.status == 1
    assert harmless(done)


def test_errors(root: Path) -> None:
    path = root / "step-00000002"
    targets: list[dict[str, Any]] = [
        {SNEAKY: torch.zeros(3)},
        {SNEAKY: torch.zeros(4, dtype=torch.int8)},
        {SNEAKY: 1},
        {"same": torch.zeros(1)},
        {"other": torch.zeros(1)},
        {},
    ]
    for target in targets:
        with pytest.raises(CheckpointError) as caught:
            shardckpt.load(path, target, keys=None if target else ["none*"])
        assert str(caught.value).isprintable()
    with pytest.raises(CheckpointError, match="do not match their digest") as caught:
        file = next(path.glob("*.safetensors"))
        file.write_bytes(bytes(file.stat().st_size))
        shardckpt.load(path)
    assert str(caught.value).isprintable()
    assert "\\u202e" in str(caught.value)


def test_metadata_comes_back_as_it_is(root: Path) -> None:
    target = {f"value{SNEAKY}": ""}
    assert shardckpt.load(root, target, strict=False).info.metadata == {EVIL: EVIL, "deep": [EVIL]}
    assert target == {f"value{SNEAKY}": EVIL}
