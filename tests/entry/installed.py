# SPDX-License-Identifier: Apache-2.0
"""Distributions in a site directory of their own: made by pip, or by hand."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SAMPLE = Path(__file__).parent / "sample"


def install_sample(scratch: Path) -> str:
    """Have pip build the sample distribution and install it; the site directory that holds it."""
    site, source = scratch / "site", scratch / "source"
    # setuptools leaves its work beside the source
    shutil.copytree(SAMPLE, source, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "--target", str(site), str(source)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return str(site)


def write_distribution(site: Path, name: str, entry_points: dict[str, str], code: str = "") -> None:
    """What an installer would leave of a distribution with one module."""
    module = name.replace("-", "_")
    (site / f"{module}.py").write_text(code)
    info = site / f"{module}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    lines = [f"{engine} = {target}" for engine, target in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[shardckpt.engines]", *lines, ""]))


@contextlib.contextmanager
def importable(site: str | None) -> Iterator[None]:
    """Have ``site`` on the path, and forget what was imported from there."""
    if site is None:
        yield
        return
    before = set(sys.modules)
    sys.path.append(site)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(site)
        for name in set(sys.modules) - before:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(site):
                del sys.modules[name]
