# SPDX-License-Identifier: Apache-2.0
"""What hostile files can do: nothing but be refused."""
