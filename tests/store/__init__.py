# SPDX-License-Identifier: Apache-2.0
"""Tests of the stores: one suite for all of them, and one module for what is peculiar to each."""
