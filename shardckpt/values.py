# SPDX-License-Identifier: Apache-2.0
"""JSON for the values of a state: exact, unambiguous, and safe to decode.

Null, booleans, strings, lists, finite floats, 64-bit integers and mappings with str keys stand for themselves. All else
is an object with the key ``$`` that names its type: ``{"$": "tuple", "v": [1, 2]}``. Nothing is pickled, and decoding
runs no code: it accepts exactly what encoding makes, and raises InvalidManifest for the rest.
"""

from __future__ import annotations

import base64
import json
import math
import re
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePath
from types import ModuleType
from typing import Any, Literal, cast

from .errors import InvalidManifest, UnsupportedLeaf
from .manifest import DEPTH_LIMIT

Value = Any
"""None, bool, int, float, str, bytes; list, tuple, dict, Counter of values; torch.dtype, torch.Size, torch.device."""

_MOST_ITEMS = 1 << 24
"""Items of a list or tuple that holds tensors."""
_PLACE_DIGITS = len(str(_MOST_ITEMS))
_INT64 = range(-(1 << 63), 1 << 63)
_SUPPORTED = "None, bool, int, float, str, bytes, and lists, tuples and dicts of them"


@dataclass(frozen=True, slots=True)
class Container:
    """A list, a tuple, or a mapping with other than str keys, that holds tensors."""

    kind: Literal["list", "tuple", "dict"]
    """What to build."""
    keys: Sequence[Any]
    """The keys of a dict in order, as a tuple; ``range(n)`` for the others, which takes no memory on a record's word."""

    @classmethod
    def of(cls, kind: Literal["list", "tuple"], size: int) -> Container:
        """The record of a list or tuple of ``size`` items."""
        return cls(kind, range(size))

    def build(self, children: Mapping[str, Any]) -> Any:
        """The container; one of which only some children are there becomes a dict of those."""
        if self.kind == "dict":
            return {key: children[text] for key in self.keys if (text := key_text(key)) in children}
        items = {at: children[str(at)] for at in sorted(int(part) for part in children if self._is_place(part))}
        if len(items) < len(self.keys):
            return items
        return list(items.values()) if self.kind == "list" else tuple(items.values())

    def strangers(self, parts: Iterable[str]) -> set[str]:
        """Those of ``parts`` that are the text of none of its keys."""
        if self.kind == "dict":
            return set(parts) - {key_text(key) for key in self.keys}
        return {part for part in parts if not self._is_place(part)}

    def _is_place(self, part: str) -> bool:
        return len(part) <= _PLACE_DIGITS and part.isdecimal() and str(int(part)) == part and int(part) in self.keys


def key_text(key: Any) -> str:
    """The key of a mapping with other than str keys as a part of names: JSON, such as ``1``, ``true`` or ``null``."""
    return key if isinstance(key, str) else json.dumps(encode_value(key), separators=(",", ":"))


def is_scalar(value: object) -> bool:
    """Whether ``value`` is a value without parts."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return not isinstance(value, Enum)
    torch = _torch()
    return torch is not None and isinstance(value, torch.dtype | torch.device | torch.Size)


def encode_value(value: Value, path: str = "") -> Any:
    """``value`` as JSON-able data; UnsupportedLeaf names what in it is not a value, by its path from ``path`` on."""
    return _encode(value, path, 0)


def decode_value(data: Any, where: str = "") -> Value:
    """The value that ``data`` stands for; InvalidManifest unless it is what `encode_value` makes of a value."""
    return _decode(data, where, 0)


# ---- encoding


def _encode(value: Value, path: str, depth: int) -> Any:
    if depth > DEPTH_LIMIT:
        raise UnsupportedLeaf(f"{path!r}: a value is nested deeper than {DEPTH_LIMIT} levels, or holds itself", path=path)
    if not isinstance(value, Enum):
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            return int(value) if value in _INT64 else {"$": "int", "v": hex(value)}
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$": "float", "v": _float_text(value)}
        if isinstance(value, str):
            return _encode_str(str(value))
        if isinstance(value, bytes):
            return {"$": "bytes", "v": base64.b64encode(value).decode()}
        encoded = _encode_torch(value)
        if encoded is not None:
            return encoded
        encoded = _encode_container(value, path, depth)
        if encoded is not None:
            return encoded
    raise unsupported(value, path)


def unsupported(value: object, path: str) -> UnsupportedLeaf:
    """The error for a value of a type that is not stored, with what to use instead."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return UnsupportedLeaf(f"{path!r}: a {kind} is not stored, and nothing is pickled. {_advice(value)}", path=path, type=kind)


def _advice(value: object) -> str:
    module = type(value).__module__
    if module == "numpy":
        scalar = not hasattr(value, "__len__") or getattr(value, "ndim", 0) == 0
        return "Use .item() for a Python number." if scalar else "Use torch.from_numpy(x), or x.tolist()."
    if isinstance(value, Enum):
        return "Store its .value, or its .name."
    if isinstance(value, set | frozenset):
        return "Use sorted(x), a list."
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return "Use x._asdict(), or tuple(x)."
    if isinstance(value, bytearray | memoryview) or hasattr(value, "getvalue"):
        return "Use bytes."
    if isinstance(value, PurePath):
        return "Use str(x)."
    if type(value).__name__ == "Generator" and hasattr(value, "get_state"):
        return "Use x.get_state(), a tensor; shardckpt.RNGState() has the state of the default generators."
    if isinstance(value, complex):
        return "Use torch.tensor(x), or a tuple of two floats."
    if callable(value):
        return "Store what identifies it, such as its name, and look it up after loading."
    if hasattr(value, "__dataclass_fields__"):
        return "Use dataclasses.asdict(x)."
    return f"Use tensors or values ({_SUPPORTED}), or give it state_dict() and load_state_dict()."


def _float_text(value: float) -> str:
    """``inf``, ``-inf``, ``nan``, or for a NaN with other bits those in hex."""
    bits = struct.pack(">d", value).hex()
    return str(float(value)) if math.isinf(value) or bits == "7ff8000000000000" else bits


def _encode_str(value: str) -> Any:
    try:
        value.encode()
    except UnicodeEncodeError:  # lone surrogates, as in undecodable file names
        return {"$": "str", "v": base64.b64encode(value.encode("utf-16-le", "surrogatepass")).decode()}
    return value


def _encode_container(value: Value, path: str, depth: int) -> Any:
    def items(values: Any) -> list[Any]:
        return [_encode(item, f"{path}/{at}", depth + 1) for at, item in enumerate(values)]

    if type(value) is list:
        return items(value)
    if type(value) is tuple:
        return {"$": "tuple", "v": items(value)}
    if isinstance(value, Container):
        return {"$": "container", "kind": value.kind, "v": _container_keys(value, path, depth)}
    if isinstance(value, Mapping):
        if not isinstance(value, Counter) and all(map(_is_plain_key, value)):
            return {key: _encode(item, f"{path}/{key}", depth + 1) for key, item in value.items()}
        pairs = [[_encode(key, path, depth + 1), _encode(item, f"{path}/{key}", depth + 1)] for key, item in value.items()]
        return {"$": "counter" if isinstance(value, Counter) else "dict", "v": pairs}
    return None


def _is_plain_key(key: object) -> bool:
    return type(key) is str and key != "$" and isinstance(_encode_str(key), str)


def _container_keys(container: Container, path: str, depth: int) -> Any:
    if container.kind != "dict":
        return len(container.keys)
    return [_encode(key, path, depth + 1) for key in container.keys]


# ---- decoding


def _decode(data: Any, where: str, depth: int) -> Value:
    if depth > DEPTH_LIMIT:
        raise _invalid(where, f"nested deeper than {DEPTH_LIMIT} levels")
    if data is None or isinstance(data, bool | str):
        return data
    if isinstance(data, int):
        _require(data in _INT64, where, "an integer beyond 64 bits")
        return data
    if isinstance(data, float):
        _require(math.isfinite(data), where, "a bare NaN or infinity")
        return data
    if isinstance(data, list):
        return [_decode(item, where, depth + 1) for item in data]
    _require(isinstance(data, dict) and all(isinstance(key, str) for key in data), where, "no JSON value")
    if "$" not in data:
        return {key: _decode(item, where, depth + 1) for key, item in data.items()}
    tag, text = data["$"], data.get("v")
    if tag == "container":
        return _decode_container(data, where, depth)
    _require(set(data) == {"$", "v"} and isinstance(tag, str), where, "a tagged value has just '$' and 'v'")
    if tag in _TEXT_TAGS:
        _require(isinstance(text, str), where, f"{tag!r} without text")
        return _checked(_TEXT_TAGS[tag], cast(str, text), data, where)
    _require(tag in ("tuple", "size", "dict", "counter"), where, f"unknown tag {tag!r}")
    _require(isinstance(text, list), where, f"{tag!r} without a list")
    items = cast("list[Any]", text)
    if tag == "tuple":
        return tuple(_decode(item, where, depth + 1) for item in items)
    if tag == "size":
        _require(all(type(item) is int and 0 <= item < 1 << 63 for item in items), where, "'size' of no integers")
        return _load_torch().Size(items)
    return _decode_pairs(tag, items, where, depth)


def _checked(decode: Callable[[str], Value], text: str, data: Any, where: str) -> Value:
    """``decode(text)``, which must encode to ``data`` again: one value has one encoding."""
    try:
        value = decode(text)
    except (ValueError, RuntimeError) as error:
        raise _invalid(where, f"bad {data['$']!r}: {error}") from None
    _require(encode_value(value) == data, where, f"{data['$']!r} is not in its canonical form")
    return value


def _decode_pairs(tag: str, pairs: list[Any], where: str, depth: int) -> Value:
    _require(all(isinstance(pair, list) and len(pair) == 2 for pair in pairs), where, f"{tag!r} without pairs")
    found: dict[Any, Any] = {}
    for key_data, item in pairs:
        key = _decode(key_data, where, depth + 1)
        _require(_is_hashable(key), where, f"a {type(key).__name__} cannot be a key")
        _require(key not in found, where, "a key comes twice")
        found[key] = _decode(item, where, depth + 1)
    if tag == "counter":
        return Counter(found)
    _require(not all(map(_is_plain_key, found)), where, "a tagged dict whose keys are plain")
    return found


def _decode_container(data: dict[str, Any], where: str, depth: int) -> Container:
    _require(set(data) == {"$", "kind", "v"}, where, "a container has just '$', 'kind' and 'v'")
    kind, keys = data["kind"], data["v"]
    if kind in ("list", "tuple"):
        _require(type(keys) is int and 0 <= keys <= _MOST_ITEMS, where, "a container without its size")
        return Container.of(kind, keys)
    _require(kind == "dict" and isinstance(keys, list), where, f"unknown kind of container {kind!r}")
    decoded = [_decode(key, where, depth + 1) for key in keys]
    _require(all(map(_is_hashable, decoded)), where, "a container with keys that cannot be keys")
    _require(len(set(decoded)) == len(decoded), where, "a container with a key that comes twice")
    return Container("dict", tuple(decoded))


def _is_hashable(key: Any) -> bool:
    if isinstance(key, tuple):
        return all(_is_hashable(item) for item in key)
    return not isinstance(key, list | dict | Container)


def _decode_int(text: str) -> int:
    value = int(text, 16)
    if value in _INT64:
        raise ValueError("it fits 64 bits")
    return value


def _decode_float(text: str) -> float:
    value: float = struct.unpack(">d", bytes.fromhex(text))[0] if len(text) == 16 else float(text)
    return value


def _invalid(where: str, problem: str) -> InvalidManifest:
    return InvalidManifest(f"invalid manifest: value {where!r}: {problem}", name=where)


def _require(condition: bool, where: str, problem: str) -> None:
    if not condition:
        raise _invalid(where, problem)


# ---- torch's own small types; torch is loaded only when a value needs it


def _torch() -> ModuleType | None:
    """torch when it is loaded; else no value can be one of its types."""
    return sys.modules.get("torch")


def _load_torch() -> Any:
    import torch

    return torch


def _encode_torch(value: Value) -> Any:
    torch = _torch()
    if torch is None:
        return None
    if isinstance(value, torch.dtype):
        return {"$": "dtype", "v": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"$": "device", "v": str(value)}
    if isinstance(value, torch.Size):
        return {"$": "size", "v": [int(size) for size in value]}
    return None


def _decode_dtype(text: str) -> Any:
    if re.fullmatch("[a-z][a-z0-9_]{0,31}", text) is None:
        raise ValueError(f"{text!r} is no dtype")
    torch = _load_torch()
    # not by getattr, for which torch would import modules
    dtype = vars(torch).get(text)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{text!r} is no dtype")
    return dtype


_TEXT_TAGS: dict[str, Callable[[str], Value]] = {
    "int": _decode_int,
    "float": _decode_float,
    "bytes": lambda text: base64.b64decode(text, validate=True),
    "str": lambda text: base64.b64decode(text, validate=True).decode("utf-16-le", "surrogatepass"),
    "dtype": _decode_dtype,
    "device": lambda text: _load_torch().device(text),
}
