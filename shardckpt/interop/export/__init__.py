# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as files of other programs: safetensors in the Hugging Face layout, torch files, DeepSpeed directories.

Whatever the format, a file is bytes that are known at once and `Content`: tensors, or parts of some, that are read, verified
and written a few megabytes at a time.
"""
