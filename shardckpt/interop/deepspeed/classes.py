# SPDX-License-Identifier: Apache-2.0
"""The classes and functions that stand in the pickles of DeepSpeed's checkpoints, and what is made in their place.

Nothing of DeepSpeed is imported and nothing of a file is called: tensors become descriptions of where their elements lie,
objects of DeepSpeed become their attributes. What is not listed here is refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from ...layout import ITEMSIZE, Ints
from .archive import Record


@dataclass(frozen=True, slots=True)
class Function:
    """What a pickle may call."""

    name: str
    """In the pickle."""
    call: Callable[..., Any]
    """What is called in its place; it raises ValueError or TypeError for bad arguments."""
    makes_keys: bool = False
    """Whether it takes the `Keys` of the pickle first."""


class Keys:
    """The keys of all dicts and sets of one pickle."""

    def __init__(self) -> None:
        self._tuples = 0

    def require(self, key: Any) -> None:
        """Raise TypeError for a key that is made to cost: one whose hash takes long, or that many others can share a hash with.

        Those of texts are random in each process; those of integers below 2**61 - 1 differ. Of tuples there may be few.
        """
        parts = key if type(key) is tuple else (key,)
        if not all(part is None or type(part) in (str, bytes, int, float, bool) for part in parts):
            raise TypeError("a key that is neither a number, a text, nor a tuple of these")
        if any(type(part) is int and not -_INT_KEYS < part < _INT_KEYS for part in parts):
            raise TypeError("a key that is an integer of more than 60 bits")
        if type(key) is tuple:
            self._tuples += 1
            if self._tuples > _TUPLE_KEYS or len(key) > _TUPLE_KEYS:
                raise TypeError(f"more than {_TUPLE_KEYS} keys that are tuples, or one that is as long")


@dataclass(frozen=True, slots=True)
class Token:
    """A class that a pickle may name and not call."""

    name: str
    """In the pickle."""


@dataclass(frozen=True, slots=True)
class Inert:
    """A class of which only the attributes are taken."""

    name: str
    """Without its module."""


@dataclass(slots=True, eq=False)
class Opaque:
    """The attributes of an object of an `Inert` class."""

    name: str
    """Of the class, without its module."""
    state: dict[str, Any] = field(default_factory=dict)
    """Its attributes."""


@dataclass(frozen=True, slots=True)
class Storage:
    """Memory that tensors are views of."""

    record: Record
    """Where it lies."""
    dtype: str | None
    """Name of its element type; None when its tensors say."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorRef:
    """A tensor in a file, of which only the description was read."""

    record: Record
    """The memory that it is a view of."""
    dtype: str
    """Name of the element type."""
    offset: int
    """First element in that memory."""
    shape: Ints
    """Sizes."""
    strides: Ints
    """In elements."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


_INT_KEYS = 1 << 60
_TUPLE_KEYS = 4096
_MOST_DIMS = 64
_LARGEST_SIZE = 1 << 60
_STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": None,
}
_INERT = {
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler", "LossScalerBase", "LossScaleConfig"),
    "deepspeed.pt.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
    "deepspeed.utils.mixed_precision_linkage": ("fragment_address",),
    "deepspeed.runtime.bf16_optimizer": ("fragment_address",),
}


def _tensor(
    storage: Storage, offset: int, size: Ints, strides: Ints, *rest: Any, dtype: torch.dtype | None = None
) -> TensorRef:
    name = storage.dtype if dtype is None else str(dtype).removeprefix("torch.")
    if name not in ITEMSIZE or len(size) != len(strides) or len(size) > _MOST_DIMS:
        raise ValueError(f"a tensor of {name} with {len(size)} sizes and {len(strides)} strides")
    shape = tuple(size)
    numbers = (offset, *shape, *strides)
    if not all(type(number) is int and 0 <= number < _LARGEST_SIZE for number in numbers):
        raise ValueError("a tensor with sizes or strides that are no sizes")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1 if prod(shape) else 0
    if last * ITEMSIZE[name] > storage.record.nbytes:
        raise ValueError(f"a tensor that ends at element {last} of a storage of {storage.record.nbytes} bytes")
    return TensorRef(storage.record, name, offset, shape, tuple(strides))


def _tensor_v3(storage: Storage, offset: int, size: Ints, strides: Ints, grad: Any, hooks: Any, dtype: Any, *rest: Any) -> Any:
    if not isinstance(dtype, torch.dtype):
        raise TypeError("a tensor without a dtype")
    return _tensor(storage, offset, size, strides, dtype=dtype)


def _parameter(data: TensorRef, *rest: Any) -> TensorRef:
    if not isinstance(data, TensorRef):
        raise TypeError("a parameter that is no tensor")
    return data


def _from_type(function: Function, kind: Token, args: tuple[Any, ...], state: Any) -> Any:
    if not isinstance(function, Function) or not function.name.startswith("torch._utils._rebuild_"):
        raise TypeError("a tensor that is made by what makes no tensors")
    if not isinstance(kind, Token) or not kind.name.startswith("torch."):
        raise TypeError("a tensor of a class that is not one of torch")
    return function.call(*args)


def _size(sizes: Any = ()) -> torch.Size:
    return torch.Size(require_shape(sizes))


def _ordered(keys: Keys, pairs: Any = ()) -> dict[Any, Any]:
    made = {}
    for key, value in pairs.items() if isinstance(pairs, dict) else pairs:
        keys.require(key)
        made[key] = value
    return made


def _counter(keys: Keys, counts: Any = ()) -> Counter[Any]:
    return Counter(_ordered(keys, counts))


def _set(keys: Keys, items: Any = ()) -> set[Any]:
    for item in items:
        keys.require(item)
    return set(items)


def _bytes(text: str = "", encoding: str = "latin1") -> bytes:
    # how protocol 2 writes bytes
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("bytes in another encoding than latin1")
    return text.encode("latin1")


def _enum(value: Any) -> Any:
    if type(value) not in (int, str):
        raise TypeError("an enumeration of other than numbers and names")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError("a version that is no text")
    return value


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": _size,
    "torch.device": lambda *args: torch.device(*args),
    "torch.torch_version.TorchVersion": _text,
    "collections.OrderedDict": _ordered,
    "collections.Counter": _counter,
    "_codecs.encode": _bytes,
    "deepspeed.runtime.zero.config.ZeroStageEnum": _enum,
    "deepspeed.runtime.fp16.loss_scaler.LossScaleProfile": _enum,
    **{f"{module}.{name}": _set for module in ("builtins", "__builtin__") for name in ("set", "frozenset")},
}

_MAKE_KEYS = (_ordered, _counter, _set)


def _known() -> dict[str, Any]:
    known: dict[str, Any] = {name: Function(name, call, call in _MAKE_KEYS) for name, call in _FUNCTIONS.items()}
    for name in _STORAGES:
        for module in ("torch", "torch.storage"):
            known[f"{module}.{name}"] = Token(f"torch.{name}")
    for name in ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"):
        known[name] = Token(name)
    for name in ITEMSIZE:
        if isinstance(vars(torch).get(name), torch.dtype):
            known[f"torch.{name}"] = vars(torch)[name]
    for module, names in _INERT.items():
        known.update({f"{module}.{name}": Inert(name) for name in names})
    return known


KNOWN: dict[str, Any] = _known()
"""What each name in a pickle stands for; a name that is not here is refused."""


def require_shape(sizes: Any) -> Ints:
    """The sizes of a tensor, if they can be some. Raises ValueError or TypeError."""
    if len(sizes) > _MOST_DIMS or not all(type(size) is int and 0 <= size < _LARGEST_SIZE for size in sizes):
        raise ValueError("sizes of a tensor that are none, or too many")
    return tuple(sizes)


def storage_dtype(token: Any) -> str | None:
    """Name of the element type of a storage class; None of one without. Raises TypeError for what is none."""
    name = token.name.removeprefix("torch.") if isinstance(token, Token) else ""
    if name not in _STORAGES:
        raise TypeError("a storage of no known class")
    return _STORAGES[name]
