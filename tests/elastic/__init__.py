# SPDX-License-Identifier: Apache-2.0
"""Jobs that lose processes and go on."""
