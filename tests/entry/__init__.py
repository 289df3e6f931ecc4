# SPDX-License-Identifier: Apache-2.0
"""Entry points: engines by name, resume, weights for inference, the program."""
