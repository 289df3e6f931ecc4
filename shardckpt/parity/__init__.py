# SPDX-License-Identifier: Apache-2.0
"""Parity: what lets one lost file of a group of ranks be rebuilt from the others."""
