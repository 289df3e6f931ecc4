# SPDX-License-Identifier: Apache-2.0
"""Loading runs no code from a checkpoint: what loads may import and call, and what loads of all kinds of state do."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile.make import CORPUS
from tests.ranks import RankPool
from tests.style.source import ROOT, Module, modules

PACKAGE = {module.name: module for module in modules("shardckpt")}
START = ("shardckpt.loading", "shardckpt.restoring", "shardckpt.maintain.verify", "shardckpt.maintain.diff")

FORBIDDEN_MODULES = {
    *("pickle", "_pickle", "pickletools", "copyreg", "shelve", "marshal", "dill", "cloudpickle", "joblib", "yaml"),
    *("importlib", "imp", "runpy", "code", "codeop", "pkgutil", "zipimport", "subprocess", "pty"),
    *("torch.serialization", "torch.package", "torch.hub", "torch.jit", "torch.utils.cpp_extension"),
}
ALLOWED_IMPORTS = {
    # asks whether NumPy is there, and imports nothing
    ("shardckpt.adapters.rng", "importlib.util"),
}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "execfile", "torch.load", "torch.save", "torch.jit.load", "torch.hub.load"),
    *("np.load", "numpy.load", "os.system", "os.popen", "import_module", "importlib.import_module"),
    *("ctypes.CDLL", "ctypes.PyDLL", "ctypes.cdll.LoadLibrary"),
}
OBJECTS = "_object"


def reachable() -> list[Module]:
    """The modules of the package that a load may come to."""
    found: dict[str, Module] = {}
    pending = list(START)
    while pending:
        name = pending.pop()
        if name in found:
            continue
        found[name] = PACKAGE[name]
        for _, imported in PACKAGE[name].imports(for_types=False):
            parts = imported.split(".")
            prefixes = [".".join(parts[:length]) for length in range(len(parts), 1, -1)]
            pending += [prefix for prefix in prefixes if prefix in PACKAGE][:1]
    return [found[name] for name in sorted(found)]


def test_the_load_path_is_what_is_looked_at() -> None:
    names = {module.name.removeprefix("shardckpt.") for module in reachable()}
    assert {"validate", "records", "manifest", "values", "tree", "read", "targets", "layout.mesh", "store.local"} <= names
    assert {"adapters.optimizer", "adapters.rng", "share", "coordinate", "store.object"} <= names


def is_forbidden(module: str, imported: str) -> bool:
    if (module, imported) in ALLOWED_IMPORTS:
        return False
    return any(imported == name or imported.startswith(f"{name}.") for name in FORBIDDEN_MODULES)


def test_the_load_path_has_nothing_that_runs_code() -> None:
    found = []
    for module in reachable():
        found += [(module.name, line, name) for line, name in module.imports() if is_forbidden(module.name, name)]
        calls = [node for node in ast.walk(module.tree) if isinstance(node, ast.Call)]
        functions = [(call.lineno, ast.unparse(call.func)) for call in calls]
        found += [(module.name, line, function) for line, function in functions if _runs_code(function)]
    assert not found


def _runs_code(function: str) -> bool:
    # all_gather_object and its like pickle
    return function in FORBIDDEN_CALLS or function.endswith((OBJECTS, f"{OBJECTS}_list"))


# ---- what loads do


@pytest.mark.slow
def test_no_load_runs_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.hostile.audited", str(tmp_path), str(CORPUS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("control") == ["compile", "exec", "import", "marshal.loads", "pickle.find_class"]
    assert found == {"whole": [], "in place": [], "hostile": []}


def load_on_ranks(place: str) -> list[str]:
    from tests.hostile.audited import load_sharded

    return load_sharded(place)


def test_no_load_on_ranks_runs_code(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, load_on_ranks, str(tmp_path), fresh=True) == [[], []]
