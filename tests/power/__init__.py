# SPDX-License-Identifier: Apache-2.0
"""Power cuts: a disk that forgets what was not flushed, and every state in which it can come back."""
