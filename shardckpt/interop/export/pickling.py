# SPDX-License-Identifier: Apache-2.0
"""Values as a pickle of protocol 2, written opcode by opcode, so that it can name classes that are not installed here.

Opcodes are those of Python's ``pickletools``; tensors and their storages are named as ``torch.save`` names them
(``torch/_tensor.py``, ``torch/serialization.py``). What `torch.load` takes with ``weights_only=True`` is a subset of it.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import Any

import torch

from shardckpt.adapters.dtypes import dtype_named
from shardckpt.errors import ExportRefused

from .content import Content

# torch.storage has a class for each of these; tensors of other dtypes are views of untyped bytes
_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex128": "ComplexDoubleStorage",
    "complex64": "ComplexFloatStorage",
}


@dataclass(frozen=True, slots=True)
class Name:
    """Something that is found in a module when the pickle is loaded."""

    module: str
    """Where."""
    name: str
    """What."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a function, or a class, returns when the pickle is loaded."""

    function: Name
    """What is called."""
    arguments: Sequence[Any]
    """With what."""


@dataclass(frozen=True, slots=True)
class Instance:
    """An object that is made without a call of its class's ``__init__``."""

    of: Name
    """Its class."""
    attributes: Mapping[str, Any]
    """Its ``__dict__``."""


ORDERED_DICT = Name("collections", "OrderedDict")


@dataclass(slots=True)
class Pickled:
    """A pickle, and the tensors that it refers to by their number."""

    data: bytes = b""
    """The pickle."""
    contents: list[Content] = field(default_factory=list)
    """The tensors; each has a storage of its own, called by its position here."""


def pickle_value(value: Any) -> Pickled:
    """``value`` as a pickle. Raises `ExportRefused` for what it has no form for."""
    pickler = _Pickler()
    pickler.put(value)
    return Pickled(b"\x80\x02" + bytes(pickler.out) + b".", pickler.contents)


class _Pickler:
    def __init__(self) -> None:
        self.out = bytearray()
        self.contents: list[Content] = []
        self._numbers: dict[int, int] = {}
        self._kinds: dict[type, Callable[[Any], None]] = {
            type(None): lambda _: self._code(b"N"),
            bool: lambda value: self._code(b"\x88" if value else b"\x89"),
            int: self._int,
            float: lambda value: self._code(b"G" + struct.pack(">d", value)),
            str: self._str,
            bytes: lambda value: self.put(Call(Name("_codecs", "encode"), (value.decode("latin1"), "latin1"))),
            tuple: lambda value: self._all(b"(", value, b"t"),
            list: lambda value: self._all(b"](", value, b"e"),
            dict: lambda value: self._all(b"}(", _flat(value), b"u"),
            OrderedDict: self._ordered,
            Counter: lambda value: self.put(Call(Name("collections", "Counter"), (dict(value),))),
            torch.Size: lambda value: self.put(Call(Name("torch", "Size"), (tuple(value),))),
            torch.dtype: lambda value: self.put(Name("torch", str(value).removeprefix("torch."))),
            torch.device: lambda value: self.put(Call(Name("torch", "device"), (str(value),))),
            Name: lambda value: self._code(f"c{value.module}\n{value.name}\n".encode()),
            Call: self._call,
            Instance: self._instance,
            Content: self._tensor,
        }

    def put(self, value: Any) -> None:
        """Append what leaves ``value`` on the unpickler's stack."""
        kind = self._kinds.get(type(value))
        if kind is None:
            raise ExportRefused(f"a {type(value).__qualname__} has no form in the exported file: {value!r}")
        kind(value)

    def _code(self, code: bytes) -> None:
        self.out += code

    def _all(self, before: bytes, values: Iterable[Any], after: bytes) -> None:
        self._code(before)
        for value in values:
            self.put(value)
        self._code(after)

    def _int(self, value: int) -> None:
        if -(1 << 31) <= value < 1 << 31:
            self._code(b"J" + struct.pack("<i", value))
            return
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        if len(data) > 255:
            raise ExportRefused(f"an integer of {len(data)} bytes has no form in the exported file: they end at 255 bytes")
        self._code(b"\x8a" + bytes([len(data)]) + data)

    def _str(self, value: str) -> None:
        data = value.encode("utf-8", "surrogatepass")
        self._code(b"X" + struct.pack("<I", len(data)) + data)

    def _ordered(self, value: Mapping[Any, Any]) -> None:
        self.put(Call(ORDERED_DICT, ()))
        self._all(b"(", _flat(value), b"u")

    def _call(self, value: Call) -> None:
        self.put(value.function)
        self.put(tuple(value.arguments))
        self._code(b"R")

    def _instance(self, value: Instance) -> None:
        self.put(value.of)
        self._code(b")\x81")
        self.put(dict(value.attributes))
        self._code(b"b")

    def _tensor(self, content: Content) -> None:
        number = self._numbers.setdefault(id(content), len(self.contents))
        if number == len(self.contents):
            self.contents.append(content)
        storage = _STORAGES.get(content.dtype)
        self.put(Name("torch._utils", "_rebuild_tensor_v2" if storage else "_rebuild_tensor_v3"))
        self._code(b"(")
        self._storage(number, content, storage)
        for argument in (0, tuple(content.shape), _strides(content.shape), False, Call(ORDERED_DICT, ())):
            self.put(argument)
        if storage is None:
            self.put(dtype_named(content.dtype))
        self._code(b"tR")

    def _storage(self, number: int, content: Content, storage: str | None) -> None:
        kind, length = Name("torch", storage or ""), content.numel
        if storage is None:
            kind, length = Name("torch.storage", "UntypedStorage"), content.nbytes
        self.put(("storage", kind, str(number), "cpu", length))
        self._code(b"Q")


def _flat(mapping: Mapping[Any, Any]) -> Iterator[Any]:
    for key, value in mapping.items():
        yield key
        yield value


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a tensor in row-major order; a dimension without elements counts as one element, as torch has it."""
    steps = accumulate((max(extent, 1) for extent in reversed(shape[1:])), mul, initial=1)
    return tuple(reversed(list(steps)))[: len(shape)] if shape else ()
