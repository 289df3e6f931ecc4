# SPDX-License-Identifier: Apache-2.0
"""Layouts against brute force with index arrays, and against torch's own DTensor arithmetic."""
