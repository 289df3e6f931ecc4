# SPDX-License-Identifier: Apache-2.0
"""GPUs: what the driver tells of them, host memory near them that they can reach, and copies of their memory to it."""

from .copies import DeviceCopier, PendingCopies
from .memory_errors import MemoryErrorGuard, MemoryErrors
from .nvml import GPU, Link, Nvml, gpu_of, local_nvml
from .pinning import pin, require_cuda, unpin, wants_pinning
from .placement import near

__all__ = [
    "GPU",
    "DeviceCopier",
    "Link",
    "MemoryErrorGuard",
    "MemoryErrors",
    "Nvml",
    "PendingCopies",
    "gpu_of",
    "local_nvml",
    "near",
    "pin",
    "require_cuda",
    "unpin",
    "wants_pinning",
]
