# SPDX-License-Identifier: Apache-2.0
"""The engine between the torch edge and the stores: plan, tables, manifest, files, commit, and the calls on top."""
