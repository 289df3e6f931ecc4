# SPDX-License-Identifier: Apache-2.0
"""Upkeep of checkpoints that are there: list, describe, verify, digest, compare. One process, any world size, no GPU."""
