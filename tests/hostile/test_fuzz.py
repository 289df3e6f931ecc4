# SPDX-License-Identifier: Apache-2.0
"""A short run of the fuzzer, from the corpus on. `tests.hostile.fuzz` says how to run it for longer."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile.make import CORPUS
from tests.style.source import ROOT

RUNS = 20_000
SECONDS = 20


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed: it has no wheel for this Python or machine"
)
def test_the_fuzzer_finds_nothing(tmp_path: Path) -> None:
    found = tmp_path / "found"
    found.mkdir()
    options = [f"-runs={RUNS}", f"-max_total_time={SECONDS}", "-max_len=16384", "-timeout=60", "-print_final_stats=1"]
    command = [sys.executable, "-m", "tests.hostile.fuzz", *options, f"-artifact_prefix={tmp_path}/", str(found), str(CORPUS)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    runs = re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)
    assert runs is not None, done.stderr[-4000:]
    # all of the corpus, and then what comes of it
    assert int(runs[1]) > len(list(CORPUS.iterdir()))
    print(f"{runs[1]} inputs tried, {len(list(found.iterdir()))} of them reached something new")
