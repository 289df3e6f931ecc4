# SPDX-License-Identifier: Apache-2.0
"""Tests of the benchmarks: that they run, check data, say what they found, and leave nothing behind. Never of speed."""
