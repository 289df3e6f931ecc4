# SPDX-License-Identifier: Apache-2.0
"""A pickle machine that can only make plain values and what `classes` lists.

The opcodes are those of https://docs.python.org/3/library/pickletools.html that picklers of protocol 2 to 5 write. Time and
memory are taken only for what stands in the pickle: no opcode makes room on its own word, the memo is a dict, calls copy no
more than there is, and what comes out is a tree, which is not much larger written out than it is with its parts shared.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from ...errors import UnsupportedPickle
from .archive import Archive, Record
from .classes import KNOWN, Function, Inert, Keys, Opaque, Storage, Token, storage_dtype
from .unfold import require_tree

OPCODE_LIMIT = 8_000_000
"""A pickle with more opcodes is refused."""
_LONGEST_INT = 1024
_SIZED = (str, bytes, tuple, list, dict, set, frozenset)
_MALFORMED = (IndexError, KeyError, TypeError, ValueError, OverflowError, AttributeError, RuntimeError, struct.error)


def read_objects(archive: Archive) -> Any:
    """The objects in a file of ``torch.save``, with `TensorRef` for tensors. Raises `UnsupportedPickle`."""
    where = archive.name
    # a file is looked into once for each storage, however often that is named
    records: dict[str, Record] = {}

    def storage(identity: Any) -> Storage:
        kind, token, key, _, count = identity[:5]
        if kind != "storage" or type(key) is not str or type(count) is not int:
            raise TypeError("a reference to something that is no storage")
        if key not in records:
            records[key] = archive.storage(key)
        return Storage(records[key], storage_dtype(token))

    return Machine(archive.pickle(), where, storage).run()


class Machine:
    """Carries out one pickle."""

    def __init__(self, data: bytes, where: str, storage: Callable[[Any], Storage]) -> None:
        self._data = data
        self._where = where
        self._storage = storage
        self._at = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._keys = Keys()
        self._copied = 0

    def run(self) -> Any:
        """The object that it stands for."""
        for _ in range(OPCODE_LIMIT):
            begin = self._at
            code = self._data[begin : begin + 1]
            self._at += 1
            if code == b".":
                if len(self._stack) != 1 or self._marks:
                    raise self._refuse("it leaves more than one object")
                return self._checked(self._stack[0])
            step = _STEPS.get(code)
            if step is None:
                raise self._refuse(
                    f"opcode {code!r} at byte {begin} is not one that torch.save writes" if code else "it is cut"
                )
            try:
                step(self)
            except _MALFORMED as error:
                raise self._refuse(f"at byte {begin}: {error}") from error
        raise self._refuse(f"it has more than {OPCODE_LIMIT} opcodes")

    def _checked(self, value: Any) -> Any:
        try:
            require_tree(value, OPCODE_LIMIT)
        except ValueError as error:
            raise self._refuse(str(error)) from error
        return value

    def _refuse(self, problem: str) -> UnsupportedPickle:
        return UnsupportedPickle(f"{self._where}: its pickle is refused: {problem}", name=self._where)

    # ---- what steps are made of

    def _take(self, count: int) -> bytes:
        if not 0 <= count <= len(self._data) - self._at:
            raise ValueError("it is cut")
        self._at += count
        return self._data[self._at - count : self._at]

    def _number(self, form: str) -> int:
        number: int = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return number

    def _line(self) -> str:
        end = self._data.index(b"\n", self._at)
        line = self._data[self._at : end].decode()
        self._at = end + 1
        return line

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if self._marks and len(self._stack) <= self._marks[-1]:
            raise ValueError("it takes what is not there")
        return self._stack.pop()

    def _pop_mark(self) -> list[Any]:
        at = self._marks.pop()
        items = self._stack[at:]
        del self._stack[at:]
        return items

    def _text(self, form: str) -> None:
        self._push(self._take(self._number(form)).decode("utf-8", "surrogatepass"))

    def _bytes(self, form: str) -> None:
        self._push(self._take(self._number(form)))

    def _old_text(self, form: str) -> None:
        self._push(self._take(self._number(form)).decode("ascii"))

    def _long(self, form: str) -> None:
        count = self._number(form)
        if count > _LONGEST_INT:
            raise ValueError(f"an integer of {count} bytes")
        self._push(int.from_bytes(self._take(count), "little", signed=True))

    def _tuple(self, count: int) -> None:
        self._push(tuple(reversed([self._pop() for _ in range(count)])))

    def _frame(self) -> None:
        self._number("<Q")

    def _memoize(self, key: int) -> None:
        self._memo[key] = self._stack[-1]

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError("items for what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._keys.require(key)
            target[key] = value

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise TypeError("items for what is no list")
        target.extend(items)

    def _add(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not set:
            raise TypeError("items for what is no set")
        for item in items:
            self._keys.require(item)
            target.add(item)

    def _dict(self) -> None:
        items = self._pop_mark()
        self._push({})
        self._set_items(items)

    def _frozen(self) -> None:
        items = self._pop_mark()
        for item in items:
            self._keys.require(item)
        self._push(frozenset(items))

    # ---- classes and calls

    def _global(self, module: str, name: str) -> None:
        known = KNOWN.get(f"{module}.{name}")
        if known is None:
            raise UnsupportedPickle(
                f"{self._where}: its pickle names {module}.{name}, which is not among the classes of DeepSpeed and torch that "
                "are read, and nothing else is ever called. If it is of your own client_state, load the file with torch.load "
                "where you trust it, make plain values of it, and save the file again",
                name=self._where,
                refused=f"{module}.{name}",
            )
        self._push(known)

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise TypeError("a name that is no text")
        self._global(module, name)

    def _charge(self, *values: Any) -> None:
        """Refuse to copy a value of the memo over and over."""
        self._copied += sum(len(value) for value in values if isinstance(value, _SIZED))
        if self._copied > 2 * len(self._data):
            raise ValueError("its calls take more than stands in it")

    def _call(self, function: Function, args: tuple[Any, ...]) -> None:
        self._push(function.call(self._keys, *args) if function.makes_keys else function.call(*args))

    def _reduce(self) -> None:
        args, function = self._pop(), self._pop()
        if type(args) is not tuple:
            raise TypeError("arguments that are no tuple")
        self._charge(args, *args)
        if isinstance(function, Function):
            self._call(function, args)
        elif isinstance(function, Inert):
            self._push(Opaque(function.name, {str(at): value for at, value in enumerate(args)}))
        else:
            raise TypeError(f"a call of {function.name}" if isinstance(function, Token) else "a call of what is no function")

    def _new(self) -> None:
        args, kind = self._pop(), self._pop()
        if type(args) is not tuple:
            raise TypeError("arguments that are no tuple")
        self._charge(args, *args)
        if isinstance(kind, Function):
            self._call(kind, args)
        elif isinstance(kind, Inert) and not args:
            self._push(Opaque(kind.name))
        else:
            raise TypeError("an object of what is no class")

    def _build(self) -> None:
        state = self._pop()
        self._charge(state)
        target = self._stack[-1]
        if isinstance(target, Opaque) and isinstance(state, dict):
            target.state.update({str(key): value for key, value in state.items()})
        elif not isinstance(target, dict):
            # attributes of a dict, such as _metadata of a module's state_dict, are left out
            raise TypeError("attributes for what has none")


def _constant(make: Callable[[], Any]) -> Callable[[Machine], None]:
    return lambda m: m._push(make())


_STEPS: dict[bytes, Callable[[Machine], Any]] = {
    b"\x80": lambda m: m._number("<B"),
    b"\x95": Machine._frame,
    b"(": lambda m: m._marks.append(len(m._stack)),
    b"0": Machine._pop,
    b"1": Machine._pop_mark,
    b"}": _constant(dict),
    b"]": _constant(list),
    b")": _constant(tuple),
    b"\x8f": _constant(set),
    b"N": _constant(lambda: None),
    b"\x88": _constant(lambda: True),
    b"\x89": _constant(lambda: False),
    b"t": lambda m: m._push(tuple(m._pop_mark())),
    b"\x85": lambda m: m._tuple(1),
    b"\x86": lambda m: m._tuple(2),
    b"\x87": lambda m: m._tuple(3),
    b"l": lambda m: m._push(m._pop_mark()),
    b"d": Machine._dict,
    b"J": lambda m: m._push(m._number("<i")),
    b"K": lambda m: m._push(m._number("<B")),
    b"M": lambda m: m._push(m._number("<H")),
    b"\x8a": lambda m: m._long("<B"),
    b"\x8b": lambda m: m._long("<i"),
    b"G": lambda m: m._push(m._number(">d")),
    b"X": lambda m: m._text("<I"),
    b"\x8c": lambda m: m._text("<B"),
    b"\x8d": lambda m: m._text("<Q"),
    b"B": lambda m: m._bytes("<I"),
    b"C": lambda m: m._bytes("<B"),
    b"\x8e": lambda m: m._bytes("<Q"),
    b"T": lambda m: m._old_text("<i"),
    b"U": lambda m: m._old_text("<B"),
    b"q": lambda m: m._memoize(m._number("<B")),
    b"r": lambda m: m._memoize(m._number("<I")),
    b"\x94": lambda m: m._memoize(len(m._memo)),
    b"h": lambda m: m._push(m._memo[m._number("<B")]),
    b"j": lambda m: m._push(m._memo[m._number("<I")]),
    b"c": lambda m: m._global(m._line(), m._line()),
    b"\x93": Machine._stack_global,
    b"R": Machine._reduce,
    b"\x81": Machine._new,
    b"b": Machine._build,
    b"s": lambda m: m._set_items([m._pop(), m._pop()][::-1]),
    b"u": lambda m: m._set_items(m._pop_mark()),
    b"a": lambda m: m._append([m._pop()]),
    b"e": lambda m: m._append(m._pop_mark()),
    b"\x90": lambda m: m._add(m._pop_mark()),
    b"\x91": Machine._frozen,
    b"Q": lambda m: m._push(m._storage(m._pop())),
}
