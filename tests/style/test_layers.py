# SPDX-License-Identifier: Apache-2.0
"""Dependency goes down only: which room may import which, and what each room may touch."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator

from tests.style.source import Module, modules

# From the ground up. A module imports from its own row and the rows before it.
ROWS: list[tuple[str, set[str]]] = [
    ("leaves", {"errors", "failure", "events", "telemetry", "options", "environment", "changes", "crew", "_version"}),
    ("storage", {"store"}),
    ("pure", {"layout", "manifest", "records", "tables", "plan", "header", "reshard", "checksum", "metrics", "validate"}),
    ("torch edge", {"values", "tree", "adapters", "describe", "state", "sampler", "guard", "ravel", "gpu"}),
    (
        "movement",
        {
            "parity",
            "available",
            "buffer",
            "stage",
            "feed",
            "live",
            "device_staging",
            "staging",
            "hostmemory",
            "write",
            "readback",
            "read",
            "share",
        },
    ),
    (
        "protocol",
        {
            "keystore",
            "wire",
            "meeting",
            "coordinate",
            "diary",
            "appointment",
            "exchange",
            "replicas",
            "commit",
            "finish",
            "images",
            "neighbors",
            "protect",
            "root",
            "pruning",
            "journal",
            "fencing",
            "failed_restores",
        },
    ),
    ("upkeep", {"maintain"}),
    ("pipeline", {"targets", "saving", "handle", "progress", "background", "loading", "restoring", "api"}),
    ("policy", {"pacing", "preemption", "policy", "checkpointer"}),
    ("outside formats", {"interop"}),
    ("other trainers", {"integrations"}),
    ("entry points", {"engines", "inference", "resuming"}),
    ("the package", {""}),
    ("measurement", {"bench", "doctor"}),
    ("command line", {"cli", "__main__"}),
]
ROW_OF = {room: number for number, (_, rooms) in enumerate(ROWS) for room in rooms}
PURE = dict(ROWS)["pure"]

IMPURE = {
    *("torch", "os", "io", "pathlib", "shutil", "socket", "subprocess", "tempfile", "glob", "time", "random"),
    *("threading", "concurrent", "asyncio", "urllib", "http", "logging", "mmap"),
}
MAY_TOUCH_FILES = {"store", "bench", "available"}
FILE_CALLS = {
    *("os.open", "os.fsync", "os.fdatasync", "os.link", "os.rename", "os.replace", "os.unlink", "os.remove"),
    *("os.mkdir", "os.makedirs", "os.rmdir", "os.pread", "os.preadv", "os.pwrite", "os.pwritev", "os.listdir"),
    *("os.scandir", "os.truncate", "os.ftruncate", "shutil.rmtree", "shutil.move", "shutil.copyfile"),
}
FILE_METHODS = {"read_bytes", "write_bytes", "read_text", "write_text", "unlink", "rmdir", "mkdir", "rename"}


def room(module: str) -> str:
    """``shardckpt.store.local`` is of the room ``store``; the package itself has the empty name."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


MODULES = modules("shardckpt")
HOMED = [module for module in MODULES if room(module.name) in ROW_OF]


def imported_rooms(module: Module) -> Iterator[tuple[int, str]]:
    for line, name in module.imports():
        if name.split(".")[0] == "shardckpt":
            target = room(name)
            # ``from shardckpt import load`` names a member of the package, not a room
            yield line, target if target in ROW_OF else ""


def test_every_module_has_a_room() -> None:
    homeless = {module.name for module in MODULES if room(module.name) not in ROW_OF}
    assert not homeless, "say in ROWS, and in the map of the README, which room these are in"


def test_imports_go_down() -> None:
    upward = []
    for module in HOMED:
        own = ROW_OF[room(module.name)]
        upward += [
            f"{module.name}, line {line}: {ROWS[own][0]} imports {target or 'the package'} ({ROWS[ROW_OF[target]][0]})"
            for line, target in imported_rooms(module)
            if ROW_OF[target] > own
        ]
    assert not upward


def test_imports_do_not_go_round_in_circles() -> None:
    names = {module.name for module in MODULES}
    needs: dict[str, set[str]] = {name: set() for name in names}
    for module in MODULES:
        for _, imported in module.imports(for_types=False):
            parts = imported.split(".")
            prefixes = [".".join(parts[:length]) for length in range(len(parts), 1, -1)]
            needs[module.name].update([prefix for prefix in prefixes if prefix in names - {module.name}][:1])
    # raises an error that names the circle
    graphlib.TopologicalSorter(needs).prepare()


def test_pure_rooms_need_neither_torch_nor_the_system() -> None:
    pure = [module for module in HOMED if room(module.name) in PURE]
    imports = {(module.name, line, name) for module in pure for line, name in module.imports()}
    assert not {found for found in imports if found[2].split(".")[0] in IMPURE}


def test_only_stores_touch_files() -> None:
    found = []
    for module in HOMED:
        if room(module.name) not in MAY_TOUCH_FILES:
            calls = [node for node in ast.walk(module.tree) if isinstance(node, ast.Call)]
            found += [
                f"{module.name}, line {call.lineno}: {ast.unparse(call.func)}" for call in calls if _touches_files(call.func)
            ]
    assert not found


def _touches_files(function: ast.expr) -> bool:
    text = ast.unparse(function)
    if "/proc/" in text or "/sys/" in text:  # asks the system about itself
        return False
    return text == "open" or text in FILE_CALLS or (isinstance(function, ast.Attribute) and function.attr in FILE_METHODS)
