# SPDX-License-Identifier: Apache-2.0
"""Names and sizes of the element types that can be stored.

Names are torch's own without the ``torch.`` prefix. safetensors (https://github.com/huggingface/safetensors) has codes for
most of them; the others are stored under the code of a type of the same size, and the manifest has the real one.
"""

from __future__ import annotations

ITEMSIZE: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
    "uint16": 2,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "complex32": 4,
    "uint32": 4,
    "int32": 4,
    "float32": 4,
    "uint64": 8,
    "int64": 8,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}
"""Bytes of one element by dtype name; a name that is not here is not storable."""

_EXACT_CODES: dict[str, str] = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
}
_STAND_IN_CODES: dict[int, str] = {1: "U8", 4: "U32", 8: "U64", 16: "U64"}


def safetensors_code(dtype: str) -> tuple[str, int]:
    """The safetensors code that stores ``dtype``, and how many elements of that code make one element of it."""
    exact = _EXACT_CODES.get(dtype)
    if exact is not None:
        return exact, 1
    size = ITEMSIZE[dtype]
    return _STAND_IN_CODES[size], max(1, size // 8)


def has_safetensors_code(dtype: str) -> bool:
    """Whether safetensors has a code for ``dtype`` itself."""
    return dtype in _EXACT_CODES
