# SPDX-License-Identifier: Apache-2.0
"""Real processes that are killed or stopped, and real file systems that fill up, refuse or disappear."""
