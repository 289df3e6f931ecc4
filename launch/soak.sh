#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Kills a training job again and again, on changing numbers of ranks, and checks what is left each time. From a bare checkout:
#   ./launch/soak.sh --rounds 300              prints its seed
#   ./launch/soak.sh --seed 7 --chain 12       one chain of rounds again
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
install_into_venv demo
cd "$ROOT"
exec "$VENV/bin/python" -m launch.soak "$@"
