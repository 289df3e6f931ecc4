# SPDX-License-Identifier: Apache-2.0
"""Every hostile manifest is refused, for its own reason; by the library and by the commands, on one harmless line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import shardckpt
from shardckpt.errors import CheckpointError, InvalidManifest
from shardckpt.manifest import MANIFEST_NAME
from tests.cli.run import run
from tests.hostile.base import examine, good
from tests.hostile.cases import CASES, Case
from tests.hostile.make import CORPUS, corpus


def test_the_good_one_is_good() -> None:
    assert examine(good()).manifest.world_size == 2


def test_the_files_are_what_the_builder_makes() -> None:
    found = {path.name: path.read_bytes() for path in CORPUS.iterdir()}
    assert found == corpus(), "run: python -m tests.hostile.make"
    assert max(map(len, found.values())) < 10_000
    print(f"{len(CASES)} hostile manifests, {len(found) - 1} of them as files")


@pytest.mark.parametrize("name", CASES)
def test_hostile_manifests_are_refused(name: str) -> None:
    case = CASES[name]
    with pytest.raises(InvalidManifest) as caught:
        examine(case.make())
    assert type(caught.value) is case.kind
    assert re.search(case.message, str(caught.value))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def place(directory: Path, case: Case) -> Path:
    directory.mkdir()
    (directory / MANIFEST_NAME).write_bytes(case.make())
    return directory


def test_commands_refuse_them_on_harmless_lines(tmp_path: Path) -> None:
    for name, case in CASES.items():
        path = place(tmp_path / name, case)
        with pytest.raises(CheckpointError) as caught:
            shardckpt.load(path)
        assert str(caught.value).isprintable(), name
        for command in ("show", "verify", "ls"):
            done = run(command, path)
            assert done.status == (0 if command == "ls" or (command == "show" and _is_late(case)) else 1), (name, command)
            assert all(line.isprintable() for line in (done.out + done.err).splitlines()), (name, command)
            assert command == "show" or case.kind.__name__ in done.out or "damaged" in done.out, (name, command)


def _is_late(case: Case) -> bool:
    """Whether only what decodes values refuses it."""
    try:
        shardckpt.validate.parse_manifest(case.make())
    except InvalidManifest:
        return False
    return True
