# SPDX-License-Identifier: Apache-2.0
"""Training with real DeepSpeed, on CPU and gloo, whose checkpoints go through shardckpt."""
