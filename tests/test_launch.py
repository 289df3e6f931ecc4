# SPDX-License-Identifier: Apache-2.0
"""The scripts of launch/: they pass shellcheck, stay small enough to copy, and the quickstart proves what it says."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.progress import Progress

from launch.quickstart import Content, Leg, compare_content, compare_losses, newest_in, run

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
TRAIN = (LAUNCH / "train_gpt.py").read_text()


def requirements(text: str) -> set[str]:
    """Normalized names of the packages that requirement lines name."""
    lines = (line.strip() for line in text.splitlines())
    names = (re.match(r"[A-Za-z0-9._-]+", line) for line in lines if not line.startswith("#"))
    return {re.sub(r"[-_.]+", "-", name[0]).lower() for name in names if name}


def test_shell_scripts_pass_shellcheck() -> None:
    scripts = [*sorted(LAUNCH.glob("*.sh")), ROOT / ".ci" / "run"]
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_direct_dependency_has_a_tested_version() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = requirements(setup["options"]["install_requires"])
    for extra in setup["options.extras_require"].values():
        wanted |= requirements(extra)
    assert wanted - requirements((LAUNCH / "constraints.txt").read_text()) == set()


def test_the_training_script_is_short_enough_to_copy() -> None:
    assert len(TRAIN.splitlines()) < 200


def test_the_checkpoint_part_of_the_training_script_is_under_ten_lines() -> None:
    """What it prints, and the option with which the quickstart checks it, are not counted."""
    code = TRAIN.split('"""', 2)[2]
    lines = [line.strip() for line in code.splitlines()]
    part = [line for line in lines if re.search(r"\b(import shardckpt|shardckpt\.|ckpt|restored|state)\b", line)]
    part = [line for line in part if not re.search(r"report(_save)?\(|copy.to|if restored:", line)]
    for call in ("shardckpt.Checkpointer(", "ckpt.on_signal(", "ckpt.restore(", "ckpt.should_save(", "ckpt.save("):
        assert any(call in line for line in part)
    assert len(part) < 10, part


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_quickstart_proves_what_it_says(tmp_path: Path) -> None:
    options = ["--steps=12", "--save-every=2", f"--keep={tmp_path / 'work'}"]
    done = subprocess.run(
        [sys.executable, LAUNCH / "quickstart.py", *options],
        capture_output=True,
        text=True,
        timeout=450,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "SIGKILL to all 4 workers" in done.stdout
    assert "SIGKILL to all 2 workers" in done.stdout
    assert "All of it holds" in done.stdout


def leg(ranks: int, first: int, last: int, found: Content | None = None, left: Content | None = None) -> Leg:
    return Leg(ranks=ranks, losses=dict.fromkeys(range(first, last + 1), 2.0), found=found, left=left)


def test_the_newest_checkpoint_counts_whatever_was_printed(tmp_path: Path) -> None:
    for step, name in ((2, "manifest.json"), (10, "manifest.json"), (12, "rank-00000-1f6c2a9e.safetensors")):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / name).touch()
    assert newest_in(tmp_path).name == "step-00000010"
    with pytest.raises(SystemExit):
        newest_in(tmp_path / "step-00000012")


def test_a_tensor_that_changed_fails_the_quickstart(capsys: pytest.CaptureFixture[str]) -> None:
    saved = Content(tensors={"a": "1", "b": "2"}, digest="12")
    legs = [leg(4, 1, 12, left=saved), leg(2, 9, 20, found=saved)]
    compare_content(legs)
    for damage in ({"a": "1", "b": "3"}, {"a": "1"}, {"a": "1", "b": "2", "c": "3"}):
        legs[1].found = Content(tensors=damage, digest="13")
        with pytest.raises(SystemExit) as end:
            compare_content(legs)
        assert end.value.code == 1
        assert "1 tensors were not restored bit for bit" in capsys.readouterr().out


def test_another_loss_after_a_resume_fails_the_quickstart() -> None:
    legs = [leg(4, 1, 12), leg(2, 9, 20)]
    compare_losses(leg(4, 1, 20), legs)
    legs[1].losses[9] += 0.01
    with pytest.raises(SystemExit) as end:
        compare_losses(leg(4, 1, 20), legs)
    assert end.value.code == 1


@pytest.mark.slow
def test_a_training_job_that_fails_fails_the_quickstart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, Progress() as progress:
        run(Leg(ranks=1), tmp_path, ["--no-such-option"], tmp_path / "log", progress, progress.add_task(""))
    assert end.value.code == 1
    assert "unrecognized arguments: --no-such-option" in capsys.readouterr().out


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    command = [sys.executable, str(LAUNCH / "quickstart.py"), f"--keep={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "not empty" in done.stderr
