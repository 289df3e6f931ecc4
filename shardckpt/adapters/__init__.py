# SPDX-License-Identifier: Apache-2.0
"""How each kind of object in a state becomes a tree of tensors and values, and how it takes one back."""
