# SPDX-License-Identifier: Apache-2.0
"""``python -m shardckpt`` is the same program as ``shardckpt``."""

from shardckpt import cli_main

if __name__ == "__main__":
    cli_main()
