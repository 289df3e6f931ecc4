# SPDX-License-Identifier: Apache-2.0
"""Tests of upkeep: listing, verification, digests, differences."""
