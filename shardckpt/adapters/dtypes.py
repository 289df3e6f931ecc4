# SPDX-License-Identifier: Apache-2.0
"""torch dtypes and their names in the format: torch's own names without ``torch.``."""

from __future__ import annotations

import torch

from ..layout import ITEMSIZE

_BY_NAME: dict[str, torch.dtype] = {
    name: dtype for name in ITEMSIZE if isinstance(dtype := getattr(torch, name, None), torch.dtype)
}
_NAMES = {dtype: name for name, dtype in _BY_NAME.items()}
_BITS: dict[int, torch.dtype] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dtype_name(dtype: torch.dtype) -> str:
    """The name of ``dtype`` in the format."""
    return _NAMES.get(dtype) or str(dtype).removeprefix("torch.")


def is_storable(dtype: torch.dtype) -> bool:
    """Whether tensors of ``dtype`` can be stored: all but quantized and sub-byte ones."""
    return dtype in _NAMES


def dtype_named(name: str) -> torch.dtype:
    """The dtype of that name; KeyError when this torch has none."""
    return _BY_NAME[name]


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as integers of the same size and shape, without a copy; complex128 gets a last dimension of two."""
    if tensor.dtype == torch.complex128:
        tensor = torch.view_as_real(tensor)
    return tensor.view(_BITS[tensor.dtype.itemsize])
