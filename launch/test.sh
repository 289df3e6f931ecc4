#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Lint, types and the whole test suite, from a bare checkout. Arguments go to pytest:
#   ./launch/test.sh                             everything
#   ./launch/test.sh -m "not slow" tests/style   a part
#   WORKERS=8 ./launch/test.sh                   more processes than the three or half the cores that it takes by itself
#   TORCH=2.6.0 PYTHON=python3.10 ./launch/test.sh   tests only, with other versions than the tested ones (TORCH=newest, too)
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install_into_venv test
install_deepspeed

cd "$ROOT"
PATH="$VENV/bin:$PATH"
# Tests start hundreds of processes: each that has imported torch would spend half a second on looking for garbage at its end.
for site in "$VENV"/lib/python3.*/site-packages; do
    printf 'import atexit, gc; atexit.register(gc.freeze)\n' >"$site/end_without_collecting.pth"
done
cores="$(getconf _NPROCESSORS_ONLN)"
# A test may start up to eight processes of its own, so a worker for every second core keeps a large machine busy. On a small
# one it takes three, as some tests wait most of their time.
workers="${WORKERS:-$((cores > 7 ? cores / 2 : 3))}"

step() {
    printf '\n=== %s\n' "$*"
    "$@"
}

# What torch says of its types differs from release to release, and lint asks for its own version only.
if [[ -z "${TORCH:-}" ]]; then
    step ruff check .
    step ruff format --check .
    step mypy
fi
# by stealing, so that no worker is left with several of the long tests when the others are done
step python -m pytest -n "$workers" --dist worksteal "$@" </dev/null
