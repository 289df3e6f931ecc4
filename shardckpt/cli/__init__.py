# SPDX-License-Identifier: Apache-2.0
"""The command line, ``shardckpt``. Commands print what functions of `shardckpt.maintain` and `shardckpt.bench` return."""

from __future__ import annotations

from .app import cli_main

__all__ = ["cli_main"]
