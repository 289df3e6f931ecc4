# SPDX-License-Identifier: Apache-2.0
"""Every fault at every storage call of small saves, loads and prunes."""
