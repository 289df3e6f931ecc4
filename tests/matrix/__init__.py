# SPDX-License-Identifier: Apache-2.0
"""Training jobs: every kind of parallelism and world size into every other, and on from there as if nothing had happened."""
