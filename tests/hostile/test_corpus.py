# SPDX-License-Identifier: Apache-2.0
"""Every hostile manifest is refused, for its own reason; by the library and by the commands, on one harmless line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import shardckpt
from shardckpt.errors import CheckpointError, InvalidManifest
from shardckpt.manifest import MANIFEST_NAME, step_directory
from tests.cli.run import run
from tests.hostile.base import examine, good
from tests.hostile.cases import CASES
from tests.hostile.make import CORPUS, corpus

SMALL = [case for case in CASES.values() if case.is_small]


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


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root whose steps have each a hostile manifest, and nothing else."""
    place = tmp_path_factory.mktemp("hostile")
    for step, case in enumerate(SMALL):
        directory = place / step_directory(step)
        directory.mkdir()
        (directory / MANIFEST_NAME).write_bytes(case.make())
    return place


@pytest.mark.parametrize("command", [["ls"], ["verify"], ["ls", "--json"], ["verify", "--json"]], ids=" ".join)
def test_commands_tell_of_them_on_harmless_lines(root: Path, command: list[str]) -> None:
    done = run(command[0], root, *command[1:])
    assert done.status == (1 if command[0] == "verify" else 0)
    assert all(line.isprintable() for line in (done.out + done.err).splitlines())


def test_commands_tell_of_each(root: Path) -> None:
    listed = run("ls", root, "--json").json["steps"]
    # of some only the values are bad, and a listing does not look at them; their files are missing
    assert [step["state"] for step in listed] == ["damaged"] * len(SMALL)
    verified = run("verify", root, "--json").json["checkpoints"]
    assert [found["problems"][0]["kind"] for found in verified] == [case.kind.__name__ for case in SMALL]


@pytest.mark.slow
def test_loads_and_commands_refuse_them(root: Path) -> None:
    for step in range(len(SMALL)):
        path = root / step_directory(step)
        with pytest.raises(CheckpointError) as caught:
            shardckpt.load(path)
        assert str(caught.value).isprintable()
    for step in range(0, len(SMALL), 5):
        done = run("show", root / step_directory(step))
        assert all(line.isprintable() for line in (done.out + done.err).splitlines())
