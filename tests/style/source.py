# SPDX-License-Identifier: Apache-2.0
"""The files of this repository, and the syntax trees of its Python modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "shardckpt"
_PLACES = ("shardckpt", "launch", "tests", ".ci", ".github")


@dataclass(frozen=True)
class Module:
    """One Python file."""

    path: Path

    @property
    def name(self) -> str:
        """Dotted name, from the root of the repository."""
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(), filename=str(self.path))

    def imports(self, *, for_types: bool = True) -> Iterator[tuple[int, str]]:
        """Line and absolute name of everything this module imports, also inside functions.

        With ``for_types=False`` without what only a type checker reads.
        """
        package = self.name.split(".")
        if self.path.name != "__init__.py":
            package = package[:-1]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import | ast.ImportFrom) and not for_types and node in self._for_types:
                continue
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) + 1 - node.level] if node.level else []
                origin = ".".join([*base, *([node.module] if node.module else [])])
                yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)

    @cached_property
    def _for_types(self) -> set[ast.AST]:
        guards = [
            node for node in ast.walk(self.tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ]
        return {child for guard in guards for statement in guard.body for child in ast.walk(statement)}


def modules(*places: str) -> list[Module]:
    """The Python files under the given folders of the repository."""
    return [Module(path) for place in places for path in sorted((ROOT / place).rglob("*.py"))]


def text_files() -> list[Path]:
    """Every file of the repository that people wrote, but for the license."""
    found = [path for path in ROOT.iterdir() if path.is_file() and path.name != "LICENSE"]
    for place in _PLACES:
        found += [path for path in (ROOT / place).rglob("*") if path.is_file()]
    return sorted(path for path in found if not _is_generated(path) and b"\0" not in path.read_bytes())


def _is_generated(path: Path) -> bool:
    parts = path.relative_to(ROOT).parts
    return "__pycache__" in parts or "corpus" in parts or any(part.endswith(".egg-info") for part in parts)
