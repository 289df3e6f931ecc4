# SPDX-License-Identifier: Apache-2.0
"""A rank of a cluster: started by torchrun, serves until it is killed."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.nodes.cluster import serve

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    serve(Path(sys.argv[1]), dist.get_rank())
