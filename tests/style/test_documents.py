# SPDX-License-Identifier: Apache-2.0
"""README.md: its links lead somewhere, its commands and names exist, its Python is Python."""

from __future__ import annotations

import ast
import re

import pytest

import shardckpt
from tests.style.source import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_links_lead_to_files() -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert targets
    assert not [target for target in targets if not (ROOT / target.split("#")[0]).exists()]


def test_files_in_the_map_exist() -> None:
    rows = [line for line in README.splitlines() if line.startswith(("| `shardckpt/", "| `launch/", "| `tests/"))]
    missing = []
    for row in rows:
        names = re.findall(r"`([^`]+)`", row.split("|")[1])
        folder = names[0].split("/")[0]
        missing += [n for n in names if not (ROOT / n).exists() and not (ROOT / folder / n).exists()]
    assert len(rows) > 5
    assert not missing


def test_scripts_that_are_shown_can_be_run() -> None:
    scripts = [line.split()[0] for block in blocks("sh") for line in block.splitlines() if line.startswith("./")]
    assert scripts
    assert not [script for script in scripts if not (ROOT / script).stat().st_mode & 0o100]


def test_examples_are_python_and_use_public_names() -> None:
    for block in blocks("python"):
        ast.parse(block)
    used = set(re.findall(r"shardckpt\.([A-Za-z]\w*)\b(?!/)", README)) - {"py"}
    rooms = {path.name for path in (ROOT / "shardckpt").iterdir() if path.is_dir()}
    assert not used - set(shardckpt.__all__) - rooms


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`shardckpt ([a-z]+)", README))))
def test_commands_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        shardckpt.cli_main([command, "--help"])
    assert end.value.code == 0
    assert command in capsys.readouterr().out
