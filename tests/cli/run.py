# SPDX-License-Identifier: Apache-2.0
"""Runs commands in this process, and in a process of their own."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

import shardckpt
from shardckpt.cli.app import app
from tests.style.source import ROOT


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed, as JSON; anything on stderr would be a mistake."""
        assert not self.err
        return json.loads(self.out)


def run(*arguments: str | Path) -> Ran:
    """Run a command in this process; an exception that is no exit is raised."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="shardckpt")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Ran(done.exit_code, done.stdout, done.stderr)


def run_process(*arguments: str | Path) -> Ran:
    """Run ``python -m shardckpt``."""
    command = [sys.executable, "-m", "shardckpt", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    return Ran(done.returncode, done.stdout, done.stderr)


def run_on_terminal(arguments: Sequence[str | Path]) -> str:
    """What ``python -m shardckpt`` writes to stderr when that is a terminal."""
    controller, terminal = pty.openpty()
    with os.fdopen(controller, "rb", buffering=0) as reader:
        command = [sys.executable, "-m", "shardckpt", *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=terminal, cwd=ROOT)
        os.close(terminal)
        shown = b""
        try:
            while part := reader.read(4096):
                shown += part
        except OSError:  # Linux reports the end of a terminal as EIO
            pass
        assert process.wait(120) == 0
    return shown.decode()


def state(step: int) -> dict[str, Any]:
    """A small state that depends on ``step``."""
    return {
        "model": {"weight": torch.arange(12.0).view(4, 3) * step, "bias": torch.ones(5)},
        "tokens": 10 * step,
        "rng": shardckpt.PerRank({"seed": step}),
    }
