# SPDX-License-Identifier: Apache-2.0
"""Layouts as records of the manifest, and back.

The decoder is the only way from records to layouts, for manifests and for what ranks tell each other, so nothing that
describes no tensor gets past it.
"""

from __future__ import annotations

import re
from math import prod

from .errors import InvalidManifest
from .layout import (
    ITEMSIZE,
    BoxLayout,
    FlatLayout,
    GlobalLayout,
    Ints,
    Layout,
    Mesh,
    MeshLayout,
    PerRankLayout,
    PerRankShapes,
    Placement,
    Replicate,
    Replicated,
    Shard,
    StridedShard,
    intersect_boxes,
    row_major_strides,
)
from .manifest import LayoutRecord, MeshRecord, TensorRecord

MAX_MESH_DIMS = 16
MAX_TENSOR_DIMS = 64
MAX_MESH_RANKS = 1 << 22
"""Ranks of all meshes of a manifest together: a regular mesh is a few bytes there, and a number per rank in memory."""
MAX_SPLITS = 1 << 13
"""Product of the split factors of a layout: a shard has up to so many pieces."""
QUOTED = 200
"""Characters of a message that come from a document."""
BOX_TESTS = 256
"""Pairs of boxes, per box, that are tried for overlap. Grids of up to 256 x 256 boxes need no more."""


def encode_placement(placement: Placement) -> str:
    """``R``, ``S<dim>`` or ``S<dim>/<split factor>``."""
    match placement:
        case Replicate():
            return "R"
        case Shard(dim):
            return f"S{dim}"
        case StridedShard(dim, factor):
            return f"S{dim}/{factor}"


def decode_placement(text: str) -> Placement:
    """The inverse of `encode_placement`; ValueError when ``text`` is none."""
    if text == "R":
        return Replicate()
    found = re.fullmatch(r"S(0|[1-9]\d{0,2})(?:/([2-9]|[1-9]\d{1,3}))?", text, re.ASCII)
    if found is None:
        raise ValueError(f"{text!r} is not a placement (R, S<dim> or S<dim>/<split factor>)")
    dim, factor = int(found[1]), found[2]
    return Shard(dim) if factor is None else StridedShard(dim, int(factor))


def encode_mesh(mesh: Mesh) -> MeshRecord:
    """A mesh as a record; regular ones cost a few integers whatever their size."""
    start = mesh.ranks[0]
    strides = tuple(
        mesh.ranks[step] - start if size > 1 else 0
        for step, size in zip(row_major_strides(mesh.shape), mesh.shape, strict=True)
    )
    if all(stride >= 0 for stride in strides) and affine_ranks(mesh.shape, start, strides) == mesh.ranks:
        return MeshRecord(mesh.shape, start=start, strides=strides)
    return MeshRecord(mesh.shape, ranks=mesh.ranks)


def affine_ranks(shape: Ints, start: int, strides: Ints) -> Ints:
    """Ranks of a regular mesh, row-major."""
    ranks = [start]
    for size, stride in zip(shape, strides, strict=True):
        ranks = [rank + at * stride for rank in ranks for at in range(size)]
    return tuple(ranks)


class LayoutEncoder:
    """Turns layouts into records, and collects the meshes and mesh layouts that they refer to by number."""

    def __init__(self) -> None:
        self._meshes: dict[Mesh, int] = {}
        self._layouts: dict[tuple[int, tuple[Placement, ...]], int] = {}

    @property
    def meshes(self) -> tuple[MeshRecord, ...]:
        """Records of all meshes met, by number."""
        return tuple(encode_mesh(mesh) for mesh in self._meshes)

    @property
    def layouts(self) -> tuple[LayoutRecord, ...]:
        """Records of all mesh layouts met, by number."""
        return tuple(LayoutRecord(mesh, tuple(encode_placement(p) for p in placements)) for mesh, placements in self._layouts)

    def encode(self, dtype: str, layout: Layout | GlobalLayout, *, value: bool = False) -> TensorRecord:
        """The record of a tensor; what one rank says of a per-rank one leaves its shape out."""
        match layout:
            case MeshLayout():
                mesh = self._meshes.setdefault(layout.mesh, len(self._meshes))
                key = (mesh, layout.placements)
                number = self._layouts.setdefault(key, len(self._layouts))
                return TensorRecord(dtype, layout.shape, layout=number)
            case FlatLayout():
                return TensorRecord(dtype, layout.shape, flat=layout.ranges)
            case BoxLayout():
                return TensorRecord(dtype, layout.shape, boxes=layout.boxes)
            case Replicated():
                return TensorRecord(dtype, layout.shape, replicated=True)
            case PerRankLayout():
                return TensorRecord(dtype, per_rank=(), value=value)
            case PerRankShapes():
                return TensorRecord(dtype, per_rank=layout.shapes, value=value)


class LayoutDecoder:
    """Turns records back into layouts, refusing what does not describe one. Equal layouts become one object."""

    def __init__(self, meshes: tuple[MeshRecord, ...], layouts: tuple[LayoutRecord, ...], world_size: int) -> None:
        self._world_size = world_size
        self._mesh_ranks = 0
        self._meshes = [self._mesh(f"meshes[{at}]", record) for at, record in enumerate(meshes)]
        self._layouts = [self._placements(f"layouts[{at}]", record) for at, record in enumerate(layouts)]
        self._known: dict[tuple[Ints, int], MeshLayout] = {}

    def _mesh(self, where: str, record: MeshRecord) -> Mesh:
        size = checked_volume(where, record.shape, 1)
        require(len(record.shape) <= MAX_MESH_DIMS, where, f"{len(record.shape)} dimensions")
        require(0 < size <= self._world_size, where, f"{size} ranks in a world of {self._world_size}")
        self._mesh_ranks += size
        require(self._mesh_ranks <= MAX_MESH_RANKS, where, f"meshes of more than {MAX_MESH_RANKS} ranks in all")
        if record.ranks is not None:
            require(record.strides is None and record.start == 0, where, "both listed and regular")
            ranks = record.ranks
        else:
            strides = record.strides
            require(strides is not None, where, "neither ranks nor strides")
            require(len(strides or ()) == len(record.shape), where, "one stride per dimension is needed")
            ranks = affine_ranks(record.shape, record.start, strides or ())
        require(len(ranks) == size == len(set(ranks)), where, "ranks do not fill the shape, or repeat")
        require(max(ranks) < self._world_size, where, f"rank {max(ranks)} in a world of {self._world_size}")
        return Mesh(ranks, record.shape)

    def _placements(self, where: str, record: LayoutRecord) -> tuple[Mesh, tuple[Placement, ...]]:
        require(record.mesh < len(self._meshes), where, f"mesh {record.mesh} does not exist")
        mesh = self._meshes[record.mesh]
        require(len(record.placements) == len(mesh.shape), where, "one placement per mesh dimension is needed")
        try:
            placements = tuple(decode_placement(text) for text in record.placements)
        except ValueError as error:
            raise InvalidManifest(f"invalid manifest: {where}: {error}") from None
        splits = prod(placement.split_factor for placement in placements if isinstance(placement, StridedShard))
        require(splits <= MAX_SPLITS, where, f"shards of {splits} pieces, where {MAX_SPLITS} are the most")
        return mesh, placements

    def decode(self, name: str, record: TensorRecord) -> GlobalLayout | Layout:
        """The layout of a record that is not an alias; `InvalidManifest` names the tensor when there is none."""
        where = f"tensor {name!r}"
        require(record.dtype in ITEMSIZE, where, f"unknown dtype {record.dtype!r}")
        forms = (record.layout, record.flat, record.boxes, record.per_rank, record.replicated or None)
        require(sum(form is not None for form in forms) == 1, where, "exactly one layout is needed")
        require(record.alias is None, where, "an alias has no layout")
        require(not record.value or (record.per_rank is not None and record.dtype == "uint8"), where, "no value")
        numel = checked_volume(where, record.shape, ITEMSIZE[record.dtype])
        if record.layout is not None:
            return self._mesh_layout(where, record.shape, record.layout)
        if record.flat is not None:
            return self._flat(where, record.shape, record.flat, numel)
        if record.boxes is not None:
            return self._boxes(where, record.shape, record.boxes)
        require(record.writers is None, where, "writers without a mesh")
        if record.replicated:
            return Replicated(record.shape)
        require(record.shape == (), where, "a shape beside shapes by rank")
        for shape in record.per_rank or ():
            checked_volume(where, shape or (), ITEMSIZE[record.dtype])
        return PerRankShapes(record.per_rank or ())

    def _mesh_layout(self, where: str, shape: Ints, number: int) -> MeshLayout:
        known = self._known.get((shape, number))
        if known is None:
            require(number < len(self._layouts), where, f"layout {number} does not exist")
            mesh, placements = self._layouts[number]
            dims = [p.dim for p in placements if not isinstance(p, Replicate)]
            require(
                max(dims, default=-1) < len(shape),
                where,
                f"sharded dimension {max(dims, default=0)} of {shape}",
            )
            known = self._known[shape, number] = MeshLayout(shape, mesh, placements)
        return known

    def _flat(self, where: str, shape: Ints, ranges: tuple[tuple[int, int, int], ...], numel: int) -> FlatLayout:
        for rank, start, stop in ranges:
            require(rank < self._world_size, where, f"rank {rank} in a world of {self._world_size}")
            require(start <= stop <= numel, where, f"range [{start}, {stop}) of {numel} elements")
        require(len({rank for rank, _, _ in ranges}) == len(ranges), where, "a rank has two ranges")
        return FlatLayout(shape, ranges)

    def _boxes(self, where: str, shape: Ints, boxes: tuple[tuple[int, Ints, Ints], ...]) -> BoxLayout:
        for rank, offsets, sizes in boxes:
            require(rank < self._world_size, where, f"rank {rank} in a world of {self._world_size}")
            require(len(offsets) == len(sizes) == len(shape), where, f"box of rank {rank} has other dimensions")
            inside = all(o + n <= size for o, n, size in zip(offsets, sizes, shape, strict=True))
            require(inside, where, f"box of rank {rank} is outside of {shape}")
        require(len({rank for rank, _, _ in boxes}) == len(boxes), where, "a rank has two boxes")
        return BoxLayout(shape, boxes)


def check_cover(where: str, layout: GlobalLayout) -> None:
    """Prove that explicit pieces cover their tensor exactly, in canonical order. A mesh covers it by construction."""
    if isinstance(layout, FlatLayout):
        covered = 0
        for _, start, stop in layout.ranges:
            require(
                start == covered,
                where,
                f"flat ranges leave a gap or overlap at element {min(start, covered)}",
            )
            covered = stop
        numel = prod(layout.shape)
        require(covered == numel, where, f"flat ranges cover {covered} of {numel} elements")
    elif isinstance(layout, BoxLayout):
        boxes = [(offsets, sizes) for _, offsets, sizes in layout.boxes]
        volume = sum(prod(sizes) for _, sizes in boxes)
        require(volume == prod(layout.shape), where, f"boxes do not cover {layout.shape} exactly")
        _check_disjoint(where, [box for box in boxes if prod(box[1])])
        require(boxes == sorted(boxes), where, "boxes are not sorted")


def _check_disjoint(where: str, boxes: list[tuple[Ints, Ints]]) -> None:
    """Refuse boxes that overlap, and ones that lie so that this would take long to find out. None of them is empty."""
    if len(boxes) < 2:
        return
    # along the dimension with most borders the fewest boxes stand side by side
    along = max(range(len(boxes[0][0])), key=lambda dim: len({offsets[dim] for offsets, _ in boxes}))
    active: list[tuple[Ints, Ints]] = []
    left = BOX_TESTS * len(boxes)
    for offsets, sizes in sorted(boxes, key=lambda box: box[0][along]):
        active = [(o, n) for o, n in active if o[along] + n[along] > offsets[along]]
        left -= len(active)
        require(left >= 0, where, f"{len(boxes)} boxes, too many of them side by side")
        clash = next((o for o, n in active if intersect_boxes(o, n, offsets, sizes)), None)
        require(clash is None, where, f"boxes at {clash} and {offsets} overlap")
        active.append((offsets, sizes))


def checked_volume(where: str, shape: Ints, itemsize: int) -> int:
    """Number of elements of ``shape``; refuses a tensor whose bytes or strides do not fit 62 bits."""
    require(len(shape) <= MAX_TENSOR_DIMS, where, f"{len(shape)} dimensions")
    # an empty tensor has strides too
    require(prod(max(1, size) for size in shape) * itemsize < 1 << 62, where, f"shape {shape} overflows")
    return prod(shape)


def require(condition: bool, where: str, problem: str) -> None:
    """Raise `InvalidManifest` with what is wrong where, unless ``condition`` holds."""
    if not condition:
        raise InvalidManifest(f"invalid manifest: {where}: {problem}", where=where)


def quoted(text: str) -> str:
    """What a decoder says of a document, shortened, as it can be printed on one line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:QUOTED])
