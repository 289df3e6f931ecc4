#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From a bare checkout: a training job on one machine that loses processes and nodes, takes them in again, and changes its
# size, all by itself; prints what that proves. Takes two minutes. Arguments go to launch/elastic.py (--help lists them).
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install_into_venv demo
# paths in arguments are as seen from here
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "$VENV/bin/python" -m launch.elastic "$@"
