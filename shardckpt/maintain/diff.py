# SPDX-License-Identifier: Apache-2.0
"""Differences between two checkpoints, element by element, in bounded memory. They may be saved from different world sizes.

Two checkpoints are equal when all names stand for the same content; how it was spread over ranks is told, and is no
difference. What ranks saved each for itself is compared only when asked for, as in `shardckpt.maintain.digest`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from shardckpt.manifest import encode_canonical
from shardckpt.plan import Plan

from .compare import Comparison, compare
from .contents import Item, list_items, matches, require_matches
from .parts import MEMORY, Leaf, Part, PartReader, check_memory, choose_rounds, cut_batches, list_leaves
from .stored import Progress, StoredCheckpoint, no_progress


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """A tensor whose elements differ."""

    name: str
    """Full name in the state tree."""
    rank: int | None
    """The rank that saved it for itself; None for a tensor of all ranks."""
    elements: int
    """How many elements it has."""
    differing: int
    """How many of them differ in any bit."""
    not_finite: int
    """How many of those are NaN or infinite on at least one side."""
    max_difference: float | None
    """The largest absolute difference of the others; None when there are none, or when the dtype is no floating one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A name that stands for different things."""

    name: str
    """Full name in the state tree."""
    a: Any
    """What it is in the first checkpoint."""
    b: Any
    """What it is in the second one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How two checkpoints differ."""

    a: str
    """The first checkpoint."""
    b: str
    """The second checkpoint."""
    only_in_a: tuple[str, ...]
    """Names that the second does not have."""
    only_in_b: tuple[str, ...]
    """Names that the first does not have."""
    kinds: tuple[Change, ...]
    """Names whose kind, dtype or shape differs, as texts such as ``float32 [3, 4]``; their elements are not compared."""
    tensors: tuple[TensorDifference, ...]
    """Tensors with elements that differ."""
    values: tuple[Change, ...]
    """Values, and kinds of containers, that differ: in the JSON of the manifest; null where there is none."""
    layouts: tuple[Change, ...]
    """Tensors that were spread differently over ranks, as texts. No difference of content."""
    per_rank_included: bool
    """Whether what ranks saved each for itself was compared."""
    tensors_compared: int
    """Tensors whose elements were compared, aliases counted with the tensor that they name."""
    bytes_read: int
    """Bytes that were read from storage; each was verified."""

    @property
    def equal(self) -> bool:
        """Whether the content is the same."""
        return not (self.only_in_a or self.only_in_b or self.kinds or self.tensors or self.values)


def diff(
    a: StoredCheckpoint,
    b: StoredCheckpoint,
    *,
    keys: Sequence[str] | None = None,
    per_rank: bool = False,
    memory: int = MEMORY,
    progress: Progress = no_progress,
) -> Difference:
    """Compare two checkpoints, or the names that match one of the shell patterns ``keys``.

    Holds at most about ``memory`` bytes. Raises `IntegrityError`, `StoreError`, and `MissingNames` for a pattern that matches
    nothing in either of them.
    """
    require_matches(keys, a, b)
    memory = check_memory(memory // 2)
    items_a, items_b = _items(a, keys, per_rank), _items(b, keys, per_rank)
    common = [name for name in items_a if name in items_b]
    kinds = [
        Change(name=name, a=text, b=other)
        for name in common
        if (text := _kind_text(items_a[name])) != (other := _kind_text(items_b[name]))
    ]
    changed = {change.name for change in kinds}
    pairs, unlike = _pair_leaves(a, b, [name for name in common if name not in changed and items_a[name].layout])
    sides = [(a.checkpoint.plan, [pair.a for pair in pairs]), (b.checkpoint.plan, [pair.b for pair in pairs])]
    batches = cut_batches(sides[0][1], memory, choose_rounds(sides, memory))
    with PartReader(a) as reader_a, PartReader(b) as reader_b:
        tensors = list(_compare_pairs(pairs, batches, reader_a, reader_b, progress))
        bytes_read = reader_a.bytes_read + reader_b.bytes_read
    return Difference(
        a=a.url,
        b=b.url,
        only_in_a=tuple(name for name in items_a if name not in items_b),
        only_in_b=tuple(name for name in items_b if name not in items_a),
        kinds=tuple(sorted([*kinds, *unlike], key=lambda change: change.name)),
        tensors=tuple(sorted(tensors, key=lambda tensor: (tensor.name, tensor.rank or 0))),
        values=tuple(sorted(_compare_values(a, b, common, keys), key=lambda change: change.name)),
        layouts=tuple(_compare_layouts(items_a, items_b, common)),
        per_rank_included=per_rank,
        tensors_compared=len(pairs),
        bytes_read=bytes_read,
    )


def _items(stored: StoredCheckpoint, keys: Sequence[str] | None, per_rank: bool) -> dict[str, Item]:
    return {item.name: item for item in list_items(stored, keys) if per_rank or not item.kind.startswith("per-rank")}


def _kind_text(item: Item) -> str:
    shape = f" {list(item.shape)}" if item.shape is not None else ""
    ranks = f" of ranks {item.layout.ranks}" if item.layout and item.kind.startswith("per-rank") else ""
    return f"{item.dtype or item.kind}{shape}{ranks}"


# ---- elements


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two leaves of one shape and dtype."""

    name: str
    a: Leaf
    b: Leaf


def _pair_leaves(a: StoredCheckpoint, b: StoredCheckpoint, names: Sequence[str]) -> tuple[list[_Pair], list[Change]]:
    """The leaves to compare, in the order of the files of ``a``, and per-rank ones that have other shapes or ranks."""
    plan_a, plan_b = a.checkpoint.plan, b.checkpoint.plan
    partners: dict[str, dict[str, str]] = {}
    # a name that is an alias on both sides is compared with the tensor that it names
    for name in sorted(names, key=lambda name: (name in plan_a.aliases, name)):
        partners.setdefault(plan_a.aliases.get(name, name), {}).setdefault(plan_b.aliases.get(name, name), name)
    leaves_a = _leaves_by_name(plan_a, partners)
    leaves_b = _leaves_by_name(plan_b, [canonical for found in partners.values() for canonical in found])
    pairs, unlike = [], []
    for canonical_a, mine in leaves_a.items():
        for canonical_b, name in partners[canonical_a].items():
            for x, y in zip(mine, leaves_b[canonical_b], strict=True):
                if x.shape == y.shape:
                    pairs.append(_Pair(name, x, y))
                else:
                    unlike.append(Change(name=name, a=_leaf_text(x), b=_leaf_text(y)))
    return pairs, unlike


def _leaves_by_name(plan: Plan, names: Iterable[str]) -> dict[str, list[Leaf]]:
    found: dict[str, list[Leaf]] = {}
    for leaf in list_leaves(plan, names, per_rank=True):
        found.setdefault(leaf.tensor.name, []).append(leaf)
    return found


def _leaf_text(leaf: Leaf) -> str:
    return f"{leaf.tensor.dtype} {list(leaf.shape)} of rank {leaf.rank}"


def _compare_pairs(
    pairs: Sequence[_Pair], batches: Iterable[Sequence[Part]], reader_a: PartReader, reader_b: PartReader, progress: Progress
) -> Iterator[TensorDifference]:
    """The pairs that differ; ``batches`` are those of the leaves of the first side."""
    total = 2 * sum(pair.a.nbytes for pair in pairs)
    done = 0
    found = [Comparison()] * len(pairs)
    for batch in batches:
        others = [replace(part, leaf=pairs[part.number].b) for part in batch]
        for part, x, y in zip(batch, reader_a.read(batch), reader_b.read(others), strict=True):
            found[part.number] += compare(x, y, part.leaf.tensor.dtype)
            done += 2 * part.nbytes
        progress(done, total)
    for pair, comparison in zip(pairs, found, strict=True):
        if comparison.differing:
            yield _difference(pair, comparison)


def _difference(pair: _Pair, found: Comparison) -> TensorDifference:
    return TensorDifference(
        name=pair.name,
        rank=pair.a.rank,
        elements=prod(pair.a.shape),
        differing=found.differing,
        not_finite=found.not_finite,
        max_difference=found.max_difference,
    )


# ---- values and layouts


def _compare_values(
    a: StoredCheckpoint, b: StoredCheckpoint, common: Sequence[str], keys: Sequence[str] | None
) -> Iterator[Change]:
    manifest_a, manifest_b = a.checkpoint.manifest, b.checkpoint.manifest
    in_both = [name for name in common if name in manifest_a.objects and name in manifest_b.objects]
    records = [(name, manifest_a.objects, manifest_b.objects) for name in in_both]
    for name in sorted({*manifest_a.containers, *manifest_b.containers}):
        if matches(name, keys):
            records.append((name, manifest_a.containers, manifest_b.containers))
    for name, in_a, in_b in records:
        x, y = in_a.get(name), in_b.get(name)
        if encode_canonical(x) != encode_canonical(y):
            yield Change(name=name, a=x, b=y)


def _compare_layouts(items_a: dict[str, Item], items_b: dict[str, Item], common: Sequence[str]) -> Iterator[Change]:
    for name in common:
        x, y = items_a[name].layout, items_b[name].layout
        if x is not None and y is not None and str(x) != str(y):
            yield Change(name=name, a=str(x), b=str(y))
