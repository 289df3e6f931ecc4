# SPDX-License-Identifier: Apache-2.0
"""Page-locked host memory, which GPUs copy to at the speed of their link and without the CPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch

from ..errors import ConfigError

logger = logging.getLogger("shardckpt")

PinMemory = Literal["auto", "always", "never"]
_PORTABLE = 1
"""cudaHostRegisterPortable: locked for every CUDA context of the process, not only that of the current device."""


def require_cuda(
    option: str,
    cuda: Any = torch.cuda,
    cuda_version: str | None = torch.version.cuda,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Raise `ConfigError` if ``option`` (such as ``"pin_memory='always'"``) is asked for and there is no CUDA device.

    ``cuda_version`` is the one that torch was built with, None for a build without CUDA.
    """
    if cuda.is_available():
        return
    if cuda_version is None:
        reason = f"this torch ({torch.__version__}) was built without CUDA; install a build that has it"
    else:
        visible = environ.get("CUDA_VISIBLE_DEVICES")
        shown = "" if visible is None else f", and CUDA_VISIBLE_DEVICES is {visible!r}"
        reason = f"torch finds none (torch.cuda.is_available() is False{shown}); see nvidia-smi"
    raise ConfigError(f"{option} needs a CUDA device, but {reason}. The default, 'auto', goes without")


def wants_pinning(mode: PinMemory, devices: Iterable[torch.device], cuda: Any = torch.cuda) -> bool:
    """Whether memory that tensors on ``devices`` are staged in is to be page-locked. Raises `ConfigError` as `require_cuda`."""
    if mode == "always":
        require_cuda("pin_memory='always'", cuda)
        return True
    return mode == "auto" and any(device.type == "cuda" for device in devices)


def launch_kernel() -> None:
    """Have the current CUDA device do next to nothing."""
    torch.ones(1, device="cuda")


def pin(address: int, nbytes: int, mode: PinMemory, cuda: Any = torch.cuda, launch: Callable[[], None] = launch_kernel) -> bool:
    """Page-lock ``nbytes`` bytes at ``address`` (page-aligned), which also touches them; True if they are locked now.

    If CUDA refuses, ``always`` raises `ConfigError`. Otherwise the log says so and the memory stays as it was: copies to it are
    right, but slow, and each holds up the thread that asks for it. What is locked has to go to `unpin` before it is unmapped.
    """
    if not nbytes or mode == "never":
        return False
    runtime = cuda.cudart()
    code = int(runtime.cudaHostRegister(address, nbytes, _PORTABLE))
    if code == 0:
        return True
    reason = f"{nbytes / 1e9:.3f} GB of host memory cannot be page-locked: {_explain(runtime, code)}"
    _clear_last_error(launch)
    if mode == "always":
        raise ConfigError(
            f"pin_memory='always', but {reason}. Give the node or container more memory, lower host_memory_limit, or take "
            "pin_memory='auto', which goes on without"
        )
    logger.warning("%s; copies from the GPU will be slower", reason)
    return False


def unpin(address: int, cuda: Any = torch.cuda, launch: Callable[[], None] = launch_kernel) -> None:
    """Unlock what `pin` locked at ``address``. Never raises: a failure is logged."""
    runtime = cuda.cudart()
    code = int(runtime.cudaHostUnregister(address))
    if code:
        logger.warning("host memory cannot be unlocked: %s", _explain(runtime, code))
        _clear_last_error(launch)


def _explain(runtime: Any, code: int) -> str:
    return f"{runtime.cudaGetErrorString(runtime.cudaError(code))} (CUDA error {code})"


def _clear_last_error(launch: Callable[[], None]) -> None:
    """Take back the error of a call that failed, which CUDA keeps for this thread.

    Otherwise the next kernel that torch launches here, whoever's it is, seems to have failed with it. torch has no call for
    this, but raises and clears such an error when it launches a kernel.
    """
    try:
        launch()
    except RuntimeError as error:
        logger.debug("cleared what CUDA kept of it: %s", error)
