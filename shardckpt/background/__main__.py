# SPDX-License-Identifier: Apache-2.0
"""``python -m shardckpt.background CONNECTION MEMORY``: the background process; the arguments are inherited descriptors."""

import sys

from .worker import main

main(int(sys.argv[1]), int(sys.argv[2]))
