# SPDX-License-Identifier: Apache-2.0
"""Parity: groups, what is made, what is rebuilt from it in a load and by repair, and what is refused."""
