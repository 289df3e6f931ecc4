# SPDX-License-Identifier: Apache-2.0
"""What the source itself must keep to: directions of imports, sizes, public names, documents that tell the truth."""
