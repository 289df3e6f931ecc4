# SPDX-License-Identifier: Apache-2.0
"""Names of leaves in a tree of nested containers, and what a checkpoint holds under them. No torch, no I/O.

A name is the keys from the root to the leaf, escaped as in JSON pointers (``~`` is ``~0``, ``/`` is ``~1``) and joined
with ``/``. Mappings with str keys need no more than the names. Lists, tuples and mappings with other keys that hold
tensors leave a `Container` record under their own name, so that they can be built again exactly.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from .errors import InvalidManifest, StateError
from .layout import GlobalLayout, Ints, PerRankShapes
from .manifest import DEPTH_LIMIT, Manifest
from .values import Container, decode_value

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_BAD_ESCAPE = re.compile("~(?![01])")


def escape(key: str) -> str:
    """A key as one part of a name."""
    return key.replace("~", "~0").replace("/", "~1")


def unescape(part: str) -> str:
    """The key of one part of a name; ValueError when it is not escaped properly."""
    if _BAD_ESCAPE.search(part):
        raise ValueError(f"{part!r} has a '~' that is followed by neither 0 nor 1")
    return part.replace("~1", "/").replace("~0", "~")


@lru_cache(maxsize=1 << 16)
def child(path: str, key: str) -> str:
    """The name of what stands under ``key`` in the container named ``path``; the root's name is empty.

    Raises StateError for keys that cannot be printed on one line, and for empty ones.
    """
    if not key or _UNPRINTABLE.search(key):
        where = f"under {path!r}" if path else "at the top of the state"
        what = "is empty" if not key else "has a control character or another one that cannot be printed"
        raise StateError(f"key {key!r} {where} {what}; rename it", path=path, key=key)
    return f"{path}/{escape(key)}" if path else escape(key)


def split(name: str) -> list[str]:
    """The keys that a name is made of; ValueError when it is no name."""
    keys = [unescape(part) for part in name.split("/")]
    if not all(keys) or len(keys) > DEPTH_LIMIT:
        raise ValueError(f"{name!r} has an empty key, or more than {DEPTH_LIMIT} keys")
    return keys


def unflatten(leaves: Mapping[str, Any], containers: Mapping[str, Container]) -> dict[str, Any]:
    """The nested tree that ``leaves`` by name stand for.

    Names come from files that may be hostile: raises InvalidManifest when a name is no name, is a leaf and a container
    at once, or does not fit the record of its container.
    """
    root: dict[str, Any] = {}
    nodes: dict[str, dict[str, Any]] = {"": root}
    for name in leaves:
        try:
            keys = split(name)
        except ValueError as error:
            raise InvalidManifest(f"invalid manifest: name {name!r}: {error}", name=name) from None
        parent, _, _ = name.rpartition("/")
        _branch(nodes, leaves, parent, keys[:-1])[keys[-1]] = leaves[name]
    for path in sorted(containers.keys() & nodes.keys(), key=lambda path: path.count("/"), reverse=True):
        if path:
            _rebuild(nodes, path, containers[path])
    return root


def _branch(nodes: dict[str, dict[str, Any]], leaves: Mapping[str, Any], path: str, keys: list[str]) -> dict[str, Any]:
    """The node named ``path``, made with those above it where they are not there yet."""
    known = nodes.get(path)
    if known is not None:
        return known
    if path in leaves:
        raise InvalidManifest(f"invalid manifest: {path!r} is a leaf, and other names are below it", name=path)
    parent, _, _ = path.rpartition("/")
    node = nodes[path] = {}
    _branch(nodes, leaves, parent, keys[:-1])[keys[-1]] = node
    return node


def _rebuild(nodes: dict[str, dict[str, Any]], path: str, container: Container) -> None:
    stray = container.strangers(nodes[path])
    if stray:
        raise InvalidManifest(
            f"invalid manifest: container {path!r} has no key {min(stray)!r}, and a name is below it", name=path
        )
    parent, _, part = path.rpartition("/")
    nodes[parent][unescape(part)] = container.build(nodes[path])


def decode_containers(records: Mapping[str, Any]) -> dict[str, Container]:
    """The containers of a manifest; raises InvalidManifest."""
    decoded = {name: decode_value(record, name) for name, record in records.items()}
    for name, container in decoded.items():
        if not isinstance(container, Container):
            raise InvalidManifest(f"invalid manifest: containers: {name!r} is not a container", name=name)
    return decoded


def read_tree(manifest: Manifest) -> dict[str, Any]:
    """The state that a manifest describes, as far as it stands there itself: None in place of tensors.

    Left out are values that each rank saved for itself. Raises InvalidManifest when values or names make no tree.
    """
    decode_value(manifest.metadata, "metadata")
    leaves: dict[str, Any] = {name: None for name, record in manifest.tensors.items() if not record.value}
    leaves |= {name: decode_value(value, name) for name, value in manifest.objects.items()}
    return unflatten(leaves, decode_containers(manifest.containers))


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What a checkpoint says of one tensor."""

    dtype: str
    """torch's name of the dtype, without ``torch.``."""
    layout: GlobalLayout
    """Global shape, and how it was spread over the ranks that saved it."""

    @property
    def per_rank(self) -> bool:
        """Whether each rank saved a tensor of its own under this name."""
        return isinstance(self.layout, PerRankShapes)

    def shape(self, rank: int) -> Ints | None:
        """Global shape; for a per-rank tensor that of ``rank``, None when that rank saved none."""
        if isinstance(self.layout, PerRankShapes):
            return self.layout.shape_of(rank)
        return self.layout.shape


@dataclass(frozen=True)
class StoredIndex:
    """What a checkpoint holds, by name, as one loading rank needs to know it before any data is read."""

    world_size: int
    """Number of ranks that saved it."""
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    """Tensors, without aliases."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Second names of tied tensors, to the name in ``tensors``."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Values that were equal on all ranks, decoded."""
    per_rank_values: Mapping[str, Any] = field(default_factory=dict)
    """Values that the rank of the same number saved, decoded; nothing for ranks from ``world_size`` on."""
    containers: Mapping[str, Container] = field(default_factory=dict)
    """Records of containers that names alone do not tell."""

    def tensor(self, name: str) -> tuple[str, StoredTensor] | None:
        """The tensor of that name or alias, with the name that it is stored under."""
        name = self.aliases.get(name, name)
        found = self.tensors.get(name)
        return None if found is None else (name, found)

    @cached_property
    def names(self) -> list[str]:
        """All names of leaves, sorted."""
        return sorted({*self.tensors, *self.aliases, *self.values, *self.per_rank_values})

    def below(self, path: str) -> list[str]:
        """Names of the leaves in the subtree of ``path``, sorted; ``path`` itself when it is a leaf."""
        if not path:
            return self.names
        low = bisect_left(self.names, path + "/")
        found = self.names[low : bisect_left(self.names, path + "0", low)]  # "0" is next to "/"
        at = bisect_left(self.names, path)
        return [path, *found] if at < len(self.names) and self.names[at] == path else found

    def children(self, path: str) -> list[str]:
        """Keys of the direct children of the container ``path``, sorted."""
        parts = {name[len(path) + 1 :].partition("/")[0] for name in self.below(path) if name != path}
        return sorted(unescape(part) for part in parts)
