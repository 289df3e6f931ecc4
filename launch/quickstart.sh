#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From a bare checkout: installs shardckpt into .venv, then trains, kills and resumes on other numbers of processes, and
# prints what that proves. Arguments go to launch/quickstart.py (--help lists them).
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install_into_venv demo
exec "$VENV/bin/python" "$ROOT/launch/quickstart.py" "$@"
