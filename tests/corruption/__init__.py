# SPDX-License-Identifier: Apache-2.0
"""What is stored is changed behind the engine's back."""
