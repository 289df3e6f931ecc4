# SPDX-License-Identifier: Apache-2.0
"""Continuous integration: the workflow is linted, runs the same command as a developer, and has the versions promised."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launch.test_slurm import ROOT

WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
TEXT = WORKFLOW.read_text()
JOBS: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)["jobs"]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def lint(workflow: str) -> subprocess.CompletedProcess[str]:
    actionlint, shellcheck = (str(Path(sys.executable).with_name(name)) for name in ("actionlint", "shellcheck"))
    command = [actionlint, "-no-color", "-oneline", "-shellcheck", shellcheck, "-"]
    return subprocess.run(command, cwd=ROOT, input=workflow, capture_output=True, text=True, timeout=120)


def commands(job: str) -> list[str]:
    return [step["run"] for step in JOBS[job]["steps"] if "run" in step]


def pinned(package: str) -> str:
    (version,) = re.findall(rf"^{package}==(\S+)$", (ROOT / "launch" / "constraints.txt").read_text(), re.MULTILINE)
    return str(version)


def minimum(requirements: str) -> str:
    (version,) = re.findall(r"^(?:torch)?>=([\d.]+)$", requirements, re.MULTILINE)
    return str(version)


def test_actionlint_finds_nothing() -> None:
    done = lint(TEXT)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("right", "wrong", "told"),
    [
        ("${{ matrix.torch }}", "${{ matrix.touch }}", '"touch" is not defined'),
        ("runs-on:", "run-on:", '"runs-on" section is missing'),
        ('cron: "17 2 * * *"', 'cron: "17 2 * *"', "invalid CRON format"),
        ("run: ./launch/test.sh\n", "run: cd launch; ./test.sh $WHAT\n", "SC2086"),
    ],
)
def test_what_is_wrong_in_a_workflow_is_found(right: str, wrong: str, told: str) -> None:
    assert right in TEXT
    done = lint(TEXT.replace(right, wrong))
    assert done.returncode == 1
    assert told in done.stdout


def test_every_job_runs_the_command_of_a_developer() -> None:
    assert commands("lint") == ["./launch/test.sh tests/style"]
    assert commands("fast") == ['./launch/test.sh -m "not slow"']
    assert commands("whole") == ["./launch/test.sh"]
    assert "launch/test.sh" in (ROOT / ".ci/run").read_text()
    for script in (".ci/run", "launch/test.sh", "launch/quickstart.sh"):
        assert os.access(ROOT / script, os.X_OK), script


def test_slow_tests_wait_for_the_night() -> None:
    assert "cron:" in TEXT
    assert [JOBS[job]["if"] for job in ("lint", "fast")] == ["github.event_name != 'schedule'"] * 2
    assert JOBS["whole"]["if"].startswith("github.event_name == 'schedule'")
    assert all(0 < job["timeout-minutes"] <= 120 for job in JOBS.values())


def test_each_python_meets_the_oldest_and_the_newest_torch() -> None:
    """The oldest ones are those that the package's metadata names, and what is tested here is among them."""
    oldest = minimum(SETUP["options"]["install_requires"]) + ".0"
    assert minimum(SETUP["options"]["python_requires"]) == PYTHONS[0]
    fast, whole = (JOBS[job]["strategy"]["matrix"] for job in ("fast", "whole"))
    assert fast == {"python": PYTHONS, "torch": [oldest, pinned("torch")]}
    assert whole["torch"] == [oldest, "newest"]
    assert whole["python"] == PYTHONS
    assert whole["include"] == [{"python": "3.11", "torch": pinned("torch")}]
    for job in ("fast", "whole"):
        assert JOBS[job]["env"] == {"TORCH": "${{ matrix.torch }}"}
        (python,) = [step["with"] for step in JOBS[job]["steps"] if "setup-python" in step.get("uses", "")]
        assert python["python-version"] == "${{ matrix.python }}"
        (cache,) = [step["with"] for step in JOBS[job]["steps"] if "cache" in step.get("uses", "")]
        assert "${{ matrix.python }}-${{ matrix.torch }}-" in cache["key"]


def test_nothing_of_the_workflow_can_write_or_floats() -> None:
    assert yaml.safe_load(TEXT)["permissions"] == {"contents": "read"}
    used = [step["uses"] for job in JOBS.values() for step in job["steps"] if "uses" in step]
    assert len(used) == 9
    for action in used:
        assert re.fullmatch(r"actions/[a-z-]+@v\d+|docker://[\w/]+:[\d.]+@sha256:[0-9a-f]{64}", action), action
