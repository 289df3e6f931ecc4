# SPDX-License-Identifier: Apache-2.0
"""Tests of the torch edge: values, trees, capture, and targets of loads. No storage and no engine."""
