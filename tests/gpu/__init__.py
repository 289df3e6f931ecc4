# SPDX-License-Identifier: Apache-2.0
"""Tests of what concerns GPUs, on machines without one, and of the few things that need one."""
