# SPDX-License-Identifier: Apache-2.0
"""How the test command installs DeepSpeed: after torch, without compiled ops, pinned; and that it goes on where it cannot."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
INSTALL = 'source launch/venv.sh; VENV="$1"; install_deepspeed; install_deepspeed; echo "went on"'


def install(venv: Path, python: str) -> subprocess.CompletedProcess[str]:
    """Install twice into a virtual environment whose interpreter is a shell script that notes how it was called."""
    (venv / "bin").mkdir(parents=True)
    script = venv / "bin" / "python"
    script.write_text(f'#!/bin/sh\necho "DS_BUILD_OPS=$DS_BUILD_OPS $*" >>{venv}/calls\n{python}\n')
    script.chmod(0o755)
    return subprocess.run(["bash", "-c", INSTALL, "install", str(venv)], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_it_is_installed_once(tmp_path: Path) -> None:
    done = install(tmp_path, "exit 0")
    assert done.returncode == 0, done.stderr
    needs, build = (tmp_path / "calls").read_text().splitlines()
    assert needs.startswith("DS_BUILD_OPS= -m pip install --no-compile --constraint ") and " ninja " in needs
    assert build.startswith("DS_BUILD_OPS=0 -m pip install --no-compile --no-build-isolation --no-deps --constraint ")
    assert build.endswith(" deepspeed")
    assert done.stderr == ""


def test_the_suite_goes_on_without_it_and_says_so(tmp_path: Path) -> None:
    done = install(tmp_path, "echo no compiler; exit 1")
    assert done.returncode == 0
    assert done.stdout.endswith("went on\n")
    assert "no compiler" in done.stderr
    assert "DeepSpeed cannot be installed here: the log above says why. Its tests are skipped." in done.stderr
    assert not (tmp_path / "installed-deepspeed").exists()
