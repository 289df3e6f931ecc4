# SPDX-License-Identifier: Apache-2.0
"""launch/venv.sh: which interpreter, which release of torch and which place it takes, by PYTHON and TORCH."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch.test_slurm import ROOT

# What stands in for an interpreter: it knows its version, makes an environment that holds itself, and notes what pip is to do.
PYTHON = """#!/bin/sh
case "$*" in
*"print("*) echo {version} ;;
*"sys.exit("*) exit {too_old} ;;
--version) echo "Python {version}.4" ;;
"-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
"-m pip "*) echo "$*" >>"{place}/calls" ;;
esac
"""
INSTALL = 'source launch/venv.sh; install_into_venv test; echo "$VENV"'


class Checkout:
    """A folder with what the scripts read, and interpreters by name."""

    def __init__(self, place: Path) -> None:
        self.place = place
        (place / "launch").mkdir()
        for name in ("setup.cfg", "pyproject.toml", "launch/venv.sh", "launch/constraints.txt"):
            shutil.copy(ROOT / name, place / name)
        for version in ("3.9", "3.10", "3.12"):
            python = place / f"python{version}"
            python.write_text(PYTHON.format(version=version, too_old=int(version == "3.9"), place=place))
            python.chmod(0o755)
        (place / "python3").symlink_to("python3.12")

    def install(self, **wanted: str) -> subprocess.CompletedProcess[str]:
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "TORCH")}
        variables |= {"PATH": f"{self.place}:{os.environ['PATH']}", **wanted}
        return subprocess.run(
            ["bash", "-c", INSTALL], cwd=self.place, env=variables, capture_output=True, text=True, timeout=120
        )

    def installed(self, **wanted: str) -> tuple[str, list[str]]:
        """Name of the place, and the lines of the constraints with which the last installation was made."""
        done = self.install(**wanted)
        assert done.returncode == 0, done.stderr
        place = Path(done.stdout.splitlines()[-1])
        assert place.parent == self.place
        last = self.calls()[-1].split()
        assert last[:6] == ["-m", "pip", "install", "--no-compile", "--editable", f"{self.place}[test]"]
        return place.name, Path(last[last.index("--constraint") + 1]).read_text().splitlines()

    def calls(self) -> list[str]:
        return (self.place / "calls").read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


TESTED = (ROOT / "launch" / "constraints.txt").read_text().splitlines()


def test_by_itself_it_takes_the_tested_versions(checkout: Checkout) -> None:
    assert checkout.installed() == (".venv", TESTED)
    assert checkout.installed() == (".venv", TESTED)
    assert len(checkout.calls()) == 1


def test_a_release_of_torch_has_a_place_of_its_own(checkout: Checkout) -> None:
    place, pins = checkout.installed(TORCH="2.6.0", PYTHON="python3.10")
    assert place == ".venv-3.10-torch-2.6.0"
    assert [pin for pin in pins if pin.startswith("torch==")] == ["torch==2.6.0"]
    # the rest is pinned as it is tested, but for sympy, of which torch 2.6 takes one release only
    assert {pin.split("==")[0] for pin in set(TESTED) ^ set(pins)} == {"torch", "sympy"}
    assert checkout.installed(TORCH="2.6.0")[0] == ".venv-3.12-torch-2.6.0"
    assert checkout.installed()[0] == ".venv"
    assert len(checkout.calls()) == 3


def test_the_newest_torch_is_not_pinned(checkout: Checkout) -> None:
    place, pins = checkout.installed(TORCH="newest")
    assert place == ".venv-3.12-torch-newest"
    assert {pin.split("==")[0] for pin in set(TESTED) ^ set(pins)} == {"torch", "sympy"}
    assert not [pin for pin in pins if pin.startswith("torch==")]


def test_an_environment_of_another_python_is_refused(checkout: Checkout) -> None:
    checkout.installed(PYTHON="python3.10")
    assert checkout.installed(PYTHON="python3.10")[0] == ".venv"
    done = checkout.install(PYTHON="python3.12")
    assert done.returncode == 1
    assert f"{checkout.place}/.venv holds Python 3.10, and PYTHON asks for 3.12; delete it, or set TORCH, too" in done.stderr
    assert len(checkout.calls()) == 1


@pytest.mark.parametrize("torch", ["../../elsewhere", "2.6.0 --index-url=x", "latest", "2", "2.6.0\nnumpy==1"])
def test_what_is_no_release_of_torch_is_refused(checkout: Checkout, torch: str) -> None:
    done = checkout.install(TORCH=torch)
    assert done.returncode == 1
    assert f"TORCH is {torch}, which is neither a release, such as 2.6.0, nor the word newest" in done.stderr
    assert not list(checkout.place.glob(".venv*"))


def test_an_interpreter_that_is_too_old_or_missing_is_refused(checkout: Checkout) -> None:
    done = checkout.install(PYTHON="python3.9")
    assert done.returncode == 1
    assert "Python 3.9.4 at " in done.stderr and "shardckpt needs 3.10 or newer (set PYTHON to one)" in done.stderr
    done = checkout.install(PYTHON="python3.99")
    assert done.returncode == 1
    assert "python3.99 is not on the PATH" in done.stderr
