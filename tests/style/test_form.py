# SPDX-License-Identifier: Apache-2.0
"""License lines, sizes of modules and functions, and words that do not belong in finished work."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.style.source import ROOT, Module, modules, text_files

SPDX = "SPDX-License-Identifier: Apache-2.0"
MODULE_LINES = 400
TEST_MODULE_LINES = 600
FUNCTION_LINES = 50
# put together here, so that this file does not hold them
UNFINISHED = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK")) + r")\b")
CODE = modules("shardckpt", "launch", "tests")


def _named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize(
    "path",
    [p for p in text_files() if p.suffix in {".py", ".sh", ".yml"} or p.parent.name == ".ci"],
    ids=_named,
)
def test_source_files_say_their_license(path: Path) -> None:
    lines = path.read_text().splitlines()
    first = [line for line in lines[:2] if not line.startswith(("#!", "# shellcheck"))]
    assert first, "an empty file"
    assert first[0] == f"# {SPDX}"


@pytest.mark.parametrize("path", text_files(), ids=_named)
def test_nothing_is_left_unfinished(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert not [f"{number}: {line}" for number, line in enumerate(lines, 1) if UNFINISHED.search(line)]


@pytest.mark.parametrize("module", CODE, ids=lambda module: module.name)
def test_modules_are_short(module: Module) -> None:
    limit = TEST_MODULE_LINES if module.name.startswith("tests.") else MODULE_LINES
    assert len(module.path.read_text().splitlines()) <= limit


@pytest.mark.parametrize("module", CODE, ids=lambda module: module.name)
def test_functions_are_short(module: Module) -> None:
    functions = [n for n in ast.walk(module.tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: size for f in functions if (size := _lines_without_docstring(f)) > FUNCTION_LINES}
    assert not long


@pytest.mark.parametrize("module", CODE, ids=lambda module: module.name)
def test_modules_say_what_they_are_for(module: Module) -> None:
    assert ast.get_docstring(module.tree) or not module.tree.body


def _lines_without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None and first.end_lineno is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines
