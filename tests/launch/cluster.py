# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the commands of a Slurm cluster: its nodes are all this machine, its queue is a file."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import IO

COMMANDS = {
    # show hostnames LIST prints the names of nodes, requeue JOB puts a job back
    "scontrol": """
case "$1 $2" in
"show hostnames") printf 'localhost\\nlocalhost\\n' ;;
requeue*) echo "$2" >>"$CLUSTER/requeued" ;;
*) exit 64 ;;
esac
""",
    # one task for each node; what they are told by scancel they get from there, srun itself dies of SIGTERM and kills them
    "srun": """
echo "srun $*"
while [[ "$1" == --* ]]; do shift; done
tasks=()
trap 'kill -KILL "${tasks[@]}"; exit 143' TERM
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    "$@" &
    tasks+=($!)
done
echo "${tasks[@]}" >"$CLUSTER/tasks"
worst=0
for task in "${tasks[@]}"; do
    status=0
    wait "$task" || status=$?
    ((status <= worst)) || worst=$status
done
exit "$worst"
""",
    # with --signal it signals all processes of the tasks, and not the script
    "scancel": """
[[ "$1" == --signal=* ]] || exit 64
signal() {
    local child
    for child in $(cat "/proc/$1/task/"*/children); do signal "$child"; done
    kill -"$SIGNAL" "$1"
}
SIGNAL="${1#--signal=}"
read -ra tasks <"$CLUSTER/tasks"
for task in "${tasks[@]}"; do signal "$task"; done
""",
}


class Cluster:
    """Two nodes with a queue, in a directory."""

    def __init__(self, place: Path) -> None:
        self.place = place
        for name, body in COMMANDS.items():
            command = place / name
            command.write_text(f"#!/usr/bin/env bash\nset -u\n{body}")
            command.chmod(0o755)

    def start(self, script: Path, arguments: list[str], log: IO[str], **environ: str) -> subprocess.Popen[str]:
        """Start a batch script as Slurm does: a copy of it, in the directory from which it was submitted."""
        copy = self.place / "slurm_script"
        copy.write_text(script.read_text())
        names = {
            "PATH": f"{self.place}:{os.environ['PATH']}",
            "CLUSTER": str(self.place),
            "SLURM_SUBMIT_DIR": str(self.place),
            "SLURM_JOB_NAME": "train",
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_JOB_NUM_NODES": "2",
            # looking up names that do not exist may take long
            "RES_OPTIONS": "timeout:1 attempts:1",
        }
        return subprocess.Popen(
            ["bash", copy, *arguments],
            env={**os.environ, **names, **environ},
            cwd=self.place,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            text=True,
        )

    def signal(self, name: str) -> None:
        """Send all processes of the step a signal."""
        environ = {**os.environ, "CLUSTER": str(self.place)}
        subprocess.run([self.place / "scancel", f"--signal={name}", "7"], env=environ, check=True, timeout=60)

    @property
    def requeued(self) -> list[str]:
        """The jobs that were put back into the queue."""
        file = self.place / "requeued"
        return file.read_text().split() if file.exists() else []
