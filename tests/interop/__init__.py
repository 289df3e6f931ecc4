# SPDX-License-Identifier: Apache-2.0
"""Tests of what other programs write and read."""
