# SPDX-License-Identifier: Apache-2.0
"""Other trainers' checkpoints go through shardckpt. Nothing of theirs is imported before it is asked for."""
