# SPDX-License-Identifier: Apache-2.0
"""Jobs under torchrun that are told to stop, and ranks of unequal speed that save by the clock."""
