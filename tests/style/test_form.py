# SPDX-License-Identifier: Apache-2.0
"""License lines, sizes of modules and functions, and words that do not belong in finished work."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.style.source import ROOT, Module, modules, text_files

SPDX = "SPDX-License-Identifier: Apache-2.0"
MODULE_LINES = 400
TEST_MODULE_LINES = 600
FUNCTION_LINES = 50
# put together here, so that this file does not hold them
UNFINISHED = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK")) + r")\b")


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def _named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_source_files_say_their_license() -> None:
    without = []
    for path in text_files():
        if path.suffix in {".py", ".sh", ".yml"} or path.parent.name == ".ci":
            first = [line for line in _lines(path)[:2] if not line.startswith(("#!", "# shellcheck"))]
            if first[:1] != [f"# {SPDX}"]:
                without.append(_named(path))
    assert not without


def test_nothing_is_left_unfinished() -> None:
    files = {_named(path): _lines(path) for path in text_files()}
    assert not [
        f"{n}:{row}: {line}" for n, lines in files.items() for row, line in enumerate(lines, 1) if UNFINISHED.search(line)
    ]


def test_modules_and_functions_are_short_and_modules_say_what_they_are_for() -> None:
    found = {module.name: flaws for module in modules("shardckpt", "launch", "tests") if (flaws := _flaws(module))}
    assert not found


def _flaws(module: Module) -> list[str]:
    limit = TEST_MODULE_LINES if module.name.startswith("tests.") else MODULE_LINES
    text = module.path.read_text()
    # not kept with the module: so many trees at a time are what takes long
    tree = ast.parse(text)
    flaws = [f"{size} lines, over {limit}"] if (size := len(text.splitlines())) > limit else []
    flaws += ["no docstring"] if tree.body and not ast.get_docstring(tree) else []
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    sizes = [(function.name, _lines_without_docstring(function)) for function in functions]
    return flaws + [f"{name}: {size} lines, over {FUNCTION_LINES}" for name, size in sizes if size > FUNCTION_LINES]


def _lines_without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None and first.end_lineno is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines
