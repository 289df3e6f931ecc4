# SPDX-License-Identifier: Apache-2.0
"""GPUs: what the driver tells of them, host memory near them that they can reach, and copies of their memory to it."""

from .copies import DeviceCopier, PendingCopies
from .memory_errors import MemoryErrorGuard, MemoryErrors
from .nvml import GPU, Failure, Link, MemoryHealth, Nvml, Reply, gpu_of, local_nvml, spellings
from .pinning import pin, require_cuda, unpin, wants_pinning
from .placement import near

__all__ = [
    "GPU",
    "DeviceCopier",
    "Failure",
    "Link",
    "MemoryErrorGuard",
    "MemoryErrors",
    "MemoryHealth",
    "Nvml",
    "PendingCopies",
    "Reply",
    "gpu_of",
    "local_nvml",
    "near",
    "pin",
    "require_cuda",
    "spellings",
    "unpin",
    "wants_pinning",
]
