# SPDX-License-Identifier: Apache-2.0
"""Several hosts on one machine: network namespaces with addresses, names and torchrun agents of their own."""
