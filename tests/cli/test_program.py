# SPDX-License-Identifier: Apache-2.0
"""The program as a process: version, exit status, what it imports, progress bars."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shardckpt
from tests.cli.run import run, run_on_terminal, run_process
from tests.maintain.make import flip, rank_file
from tests.style.source import ROOT


def test_version() -> None:
    done = run_process("--version")
    assert (done.status, done.err) == (0, "")
    # what was installed has no kind of build in its version, as torch itself may
    installed = importlib.metadata.version("torch")
    assert done.out.splitlines() == [f"shardckpt {shardckpt.__version__}", "license Apache-2.0", f"torch {installed}"]
    assert torch.__version__.startswith(installed.partition("+")[0])


def test_status_and_streams_of_the_process(root: Path) -> None:
    flip(rank_file(root / "step-00000003"), -1)
    done = run_process("verify", root, "--read-data")
    assert (done.status, done.err) == (1, "")
    assert "DAMAGED" in done.out
    done = run_process("show", root / "nothing")
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("shardckpt: error: ")
    assert "Traceback" not in done.err


def test_a_full_disk_under_the_output_is_one_line(root: Path) -> None:
    command = [sys.executable, "-m", "shardckpt", "ls", str(root)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr == "shardckpt: error: [Errno 28] No space left on device\n"


def test_a_reader_that_has_gone_gets_no_traceback(root: Path) -> None:
    command = [sys.executable, "-m", "shardckpt", "show", str(root), "--json"]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=120, cwd=ROOT)
    assert (done.returncode, done.stderr) == (1, "")


def test_main_ends_with_the_status(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status in ((["ls", str(root)], 0), (["ls", "/nothing"], 1), (["ls"], 2)):
        with pytest.raises(SystemExit) as end:
            shardckpt.cli_main(arguments)
        assert end.value.code == status
    assert "there is no checkpoint in /nothing" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["ls", "show", "verify", "repair", "digest", "diff", "prune", "doctor"])
def test_help_documents_json(command: str) -> None:
    done = run(command, "--help")
    assert done.status == 0
    assert "--json: {" in done.out


def test_bench_is_a_command() -> None:
    done = run("bench", "--help")
    assert done.status == 0
    assert "reshard" in done.out
    assert run("bench", "nonsense").status == 2


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], ["ls", "{}"], ["show", "{}"], ["prune", "{}", "--keep-last", "3"]]
)
def test_commands_that_read_no_data_start_without_torch(root: Path, arguments: list[str]) -> None:
    script = (
        "import sys\nfrom shardckpt import cli_main\n"
        "try:\n    cli_main(sys.argv[1:])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-c", script, *(argument.format(root) for argument in arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["verify", "--read-data"], ["digest"]])
def test_reading_shows_a_bar_on_a_terminal_only(root: Path, arguments: list[str]) -> None:
    assert "━" in run_on_terminal([*arguments, root])
    assert run(*arguments, root).err == ""


@pytest.mark.slow
def test_no_bar_with_json(root: Path) -> None:
    assert run_on_terminal(["diff", root, root, "--json"]) == ""
