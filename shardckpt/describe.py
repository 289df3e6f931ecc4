# SPDX-License-Identifier: Apache-2.0
"""From a tensor, as a training program holds it, to this rank's memory and the layout over all ranks. No copies."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import msgspec
import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import xxhash
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parameter import is_lazy

from .adapters.dtypes import as_bits, is_storable
from .adapters.loaded import is_async_tensor, is_dtensor
from .errors import StateError, UnsupportedLeaf
from .layout import (
    BoxLayout,
    FlatLayout,
    Ints,
    Layout,
    Mesh,
    MeshLayout,
    PerRankLayout,
    Piece,
    Placement,
    Replicate,
    Replicated,
    Shard,
    StridedShard,
)
from .ravel import flat_bytes

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement as DPlacement

_SAMPLES = 64
_LARGEST_BITS = 8
"""Bytes; larger elements are sampled in parts of this size."""


# Of the next two each save makes one per tensor, and Structs take a tenth of the time of frozen dataclasses.


class LocalTensor(msgspec.Struct, frozen=True, eq=False):
    """One named tensor as this rank sees it."""

    name: str
    """Where it stands in the state tree; in a load, the stored name to read (which may then come more than once)."""
    data: torch.Tensor
    """This rank's part: plain, an alias of the live memory, of any device and strides, maybe empty."""
    layout: Layout
    """Global shape, and what each rank holds."""
    alias_of: str | None = None
    """When saving: the first name of the same tensor (tied weights)."""
    source_rank: int | None = None
    """When loading a per-rank tensor: which rank's to read."""


class Placed(msgspec.Struct, frozen=True, eq=False):
    """Memory with a layout that was worked out already; a leaf of the trees that adapters make."""

    data: torch.Tensor
    """This rank's part."""
    layout: Layout
    """What each rank holds."""
    stored: bool = True
    """Whether this rank takes part in saving it; False where other ranks save their equal copies."""


@dataclass(frozen=True, slots=True, eq=False)
class Flat:
    """This rank's slice of a tensor that is cut up flat, as ZeRO and other flat parameter buffers do.

    ``data`` holds elements ``start .. start + data.numel()`` of the raveled tensor of ``shape``. The slices of all ranks
    cover the tensor without overlap. Padding is left out.
    """

    data: torch.Tensor
    """One-dimensional."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: int
    """First element of the raveled tensor that this rank holds."""


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Which rank this is."""

    rank: int
    """Global rank."""
    world_size: int
    """Number of ranks."""

    @classmethod
    def here(cls) -> Whereabouts:
        """Of the default process group; rank 0 of 1 when there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls(0, 1)


_TENSOR_LEAVES = (torch.Tensor, Placed, Flat)


def is_tensor_leaf(value: object) -> bool:
    """Whether `describe` takes ``value``."""
    return isinstance(value, _TENSOR_LEAVES) or _is_sharded_tensor(value)


def describe(leaf: Any, path: str, rank: int, *, per_rank: bool = False) -> Placed | None:
    """This rank's memory of a tensor leaf and its layout; None when this rank holds no part of it.

    Raises UnsupportedLeaf for tensors that cannot be stored as they are, StateError when a layout does not describe
    the memory.
    """
    if per_rank:
        return _describe_per_rank(leaf, path)
    if is_dtensor(leaf):
        placed = _describe_dtensor(leaf, path)
    elif isinstance(leaf, Placed):
        placed = Placed(local_data(leaf.data, path), leaf.layout, leaf.stored)
    elif isinstance(leaf, Flat):
        placed = _describe_flat(leaf, path, rank)
    elif _is_sharded_tensor(leaf):
        return _describe_sharded(leaf, path, rank)
    else:
        data = local_data(leaf, path)
        return Placed(data, _replicated(data.shape))
    piece = placed.layout.piece(rank)
    if piece is None:
        return None
    if placed.data.shape != piece.shape:
        raise StateError(
            f"{path!r}: its layout says that rank {rank} holds {piece.shape} of {placed.layout.shape}, but the local "
            f"tensor is {tuple(placed.data.shape)}. The placements do not describe the data: make the tensor with "
            "distribute_tensor, or give DTensor.from_local the true shape.",
            path=path,
            rank=rank,
        )
    return placed


def local_data(tensor: torch.Tensor, path: str) -> torch.Tensor:
    """A plain tensor on the same memory; UnsupportedLeaf, with advice, when there is none."""
    if is_lazy(tensor):
        raise _refuse(path, "an uninitialized lazy parameter", "Run the model once before saving or loading.")
    if is_dtensor(tensor):
        # to_local() of one that requires grad makes a view, and a context to go without costs more than all else here
        tensor = tensor._local_tensor
    data = tensor.detach()
    if type(data) is not torch.Tensor:
        data = _unwrap_subclass(data)
    # quantized tensors have dtypes of their own, which are not storable
    is_plain = type(data) is torch.Tensor and data.layout is torch.strided and is_storable(data.dtype) and not data.is_meta
    if not is_plain:
        raise _refusal(data, path)
    if data.is_conj() or data.is_neg():
        return data.resolve_conj().resolve_neg()
    return data


def _refusal(data: torch.Tensor, path: str) -> StateError:
    """Why a tensor is not stored, and what to do instead."""
    if data.layout is not torch.strided:
        return _refuse(path, f"a tensor of layout {data.layout}", "Store its parts, such as indices() and values().")
    if data.is_quantized:
        return _refuse(path, "a quantized tensor", "Store int_repr(), q_scale() and q_zero_point().")
    if type(data) is not torch.Tensor:
        kind = f"{type(data).__module__}.{type(data).__qualname__}"
        return _refuse(path, f"a tensor of type {kind}", "Store the plain tensors that it is made of.")
    if not is_storable(data.dtype):
        return _refuse(path, f"a tensor of {data.dtype}", "View or convert it to a dtype of whole bytes.")
    return StateError(
        f"{path!r}: the tensor is on the meta device and has no memory. Give the model memory first: "
        "model.to_empty(device=...), after fully_shard or parallelize_module.",
        path=path,
    )


@functools.lru_cache(maxsize=1 << 16)
def _replicated(shape: torch.Size) -> Replicated:
    # one object for equal ones, which are compared from save to save
    return Replicated(tuple(shape))


def _unwrap_subclass(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor inside of a subclass that only adds behaviour to it; any other subclass as it is."""
    if is_async_tensor(tensor):
        waited: torch.Tensor = tensor.wait()
        return waited
    flatten = getattr(tensor, "__tensor_flatten__", None)
    parts: list[str] = flatten()[0] if flatten is not None else []
    if len(parts) == 1:  # such as the weights of FSDP2 with float8 all-gather
        inner = getattr(tensor, parts[0])
        if type(inner) is torch.Tensor and inner.shape == tensor.shape and inner.dtype == tensor.dtype:
            return inner.detach()
    return tensor


def check_fillable(tensor: torch.Tensor, path: str) -> None:
    """Raise StateError when ``tensor`` cannot be filled in place."""
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise StateError(
            f"{path!r}: cannot load into a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()}, "
            "several elements of which are one place in memory. Make it contiguous(), or leave it out with keys=.",
            path=path,
        )


def _refuse(path: str, what: str, advice: str) -> UnsupportedLeaf:
    return UnsupportedLeaf(f"{path!r}: {what} is not stored. {advice}", path=path, type=what)


def _describe_per_rank(leaf: Any, path: str) -> Placed:
    if not isinstance(leaf, torch.Tensor) or is_dtensor(leaf):
        raise _refuse(
            path,
            f"a {type(leaf).__name__} inside PerRank",
            "It says itself how ranks share it: take it out of PerRank, or use its local tensor.",
        )
    data = local_data(leaf, path)
    return Placed(data, PerRankLayout(tuple(data.shape)))


def _describe_flat(leaf: Flat, path: str, rank: int) -> Placed:
    data = local_data(leaf.data, path)
    stop = leaf.start + data.numel()
    shape = tuple(int(size) for size in leaf.shape)
    if data.dim() != 1 or leaf.start < 0 or stop > torch.Size(shape).numel():
        raise StateError(
            f"{path!r}: Flat needs one-dimensional data inside the raveled tensor of shape {shape}, but got data of "
            f"shape {tuple(data.shape)} for elements {leaf.start} to {stop}. Leave padding out.",
            path=path,
        )
    layout = FlatLayout(shape, ((rank, leaf.start, stop),))
    # a slice that is all of the tensor has its shape
    return Placed(data.view(Piece.flat(shape, leaf.start, stop).shape), layout)


# ---- DTensor


def _describe_dtensor(tensor: DTensor, path: str) -> Placed:
    # one object per layout, which remembers its pieces from tensor to tensor and from save to save
    mesh, key = tensor.device_mesh, (tensor.shape, tensor.placements)
    known = _LAYOUTS.get(mesh)
    if known is None:
        known = _LAYOUTS[mesh] = {}
    layout = known.get(key)
    if layout is None:
        placements = tuple(convert_placement(placement, path) for placement in tensor.placements)
        layout = known[key] = MeshLayout(tuple(tensor.shape), convert_mesh(mesh), placements)
    return Placed(local_data(tensor, path), layout)


_LAYOUTS: WeakKeyDictionary[DeviceMesh, dict[tuple[torch.Size, tuple[DPlacement, ...]], MeshLayout]] = WeakKeyDictionary()


def convert_mesh(mesh: DeviceMesh) -> Mesh:
    """A device mesh as pure data; the same object for the same mesh."""
    known = _MESHES.get(mesh)
    if known is None:
        known = _MESHES[mesh] = Mesh(tuple(mesh.mesh.flatten().tolist()), tuple(mesh.mesh.shape))
    return known


_MESHES: WeakKeyDictionary[DeviceMesh, Mesh] = WeakKeyDictionary()


def convert_placement(placement: DPlacement, path: str) -> Placement:
    """A DTensor placement as pure data."""
    from torch.distributed.tensor import Replicate as DReplicate
    from torch.distributed.tensor import Shard as DShard
    from torch.distributed.tensor.placement_types import _StridedShard

    if isinstance(placement, _StridedShard):  # before Shard, of which it is a subclass in older versions of torch
        factor = int(placement.split_factor)
        return Shard(placement.dim) if factor == 1 else StridedShard(placement.dim, factor)
    if isinstance(placement, DShard):
        return Shard(placement.dim)
    if isinstance(placement, DReplicate):
        return Replicate()
    raise _refuse(
        path,
        f"a DTensor with placement {placement}",
        "Its ranks hold unreduced parts: redistribute() it to Shard or Replicate.",
    )


# ---- ShardedTensor


def _is_sharded_tensor(value: object) -> bool:
    # by name: importing torch.distributed._shard costs time, and no instance exists where it is not imported
    kind = type(value)
    return kind.__name__ == "ShardedTensor" and kind.__module__.startswith("torch.distributed._shard")


def _describe_sharded(tensor: Any, path: str, rank: int) -> Placed | None:
    metadata = tensor.metadata()
    boxes = []
    for shard in metadata.shards_metadata:
        boxes.append((shard.placement.rank(), tuple(shard.shard_offsets), tuple(shard.shard_sizes)))
    if len({owner for owner, _, _ in boxes}) < len(boxes):
        raise _refuse(path, "a ShardedTensor with several shards on one rank", "Use a DTensor.")
    shards = tensor.local_shards()
    if not shards:
        return None
    boxes.sort(key=lambda box: box[1:])
    layout = BoxLayout(tuple(metadata.size), tuple(boxes))
    piece = layout.piece(rank)
    data = local_data(shards[0].tensor, path)
    if piece is None or piece.shape != tuple(data.shape):
        raise StateError(f"{path!r}: the metadata of the ShardedTensor do not describe its local shard", path=path)
    return Placed(data, layout)


# ---- replica samples


def sample_digest(local: torch.Tensor) -> int:
    """xxh3-64 of at most 64 elements spread over ``local``: equal for equal tensors, whatever device and strides."""
    return sample_digests([local])[0]


def sample_digests(tensors: Sequence[torch.Tensor]) -> list[int]:
    """`sample_digest` of each tensor, with one transfer per device."""
    digests = [xxhash.xxh3_64_intdigest(b"")] * len(tensors)
    samples = {}
    for at, tensor in enumerate(tensors):
        if not tensor.numel():
            continue
        if tensor.is_cpu and tensor.is_contiguous():
            digests[at] = xxhash.xxh3_64_intdigest(_sample_memory(tensor))
        else:
            samples[at] = _sample(tensor)
    for device in {sample.device for sample in samples.values()}:
        chosen = [at for at, sample in samples.items() if sample.device == device]
        host = torch.cat([samples[at] for at in chosen]).cpu().numpy().tobytes()
        start = 0
        for at in chosen:
            digests[at] = xxhash.xxh3_64_intdigest(host[start : start + samples[at].numel()])
            start += samples[at].numel()
    return digests


def _sample_memory(tensor: torch.Tensor) -> bytes:
    """What `_sample` takes, of a contiguous tensor in host memory, in a tenth of the time."""
    size = min(tensor.itemsize, _LARGEST_BITS)
    count = tensor.nbytes // size
    if count <= _SAMPLES:
        # the many step counters of optimizers, without a call of torch for each
        return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)
    memory = flat_bytes(tensor)
    assert memory is not None
    sampled: bytes = memory.numpy().view(f"V{size}")[_places(count)].tobytes()
    return sampled


@functools.lru_cache(maxsize=1024)
def _places(count: int) -> npt.NDArray[np.int64]:
    """Where in ``count`` elements the sampled ones are."""
    return np.arange(_SAMPLES, dtype=np.int64) * (count - 1) // (_SAMPLES - 1)


@torch.no_grad()
def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes of the sampled elements, on the tensor's device."""
    bits = as_bits(tensor)
    count = min(bits.numel(), _SAMPLES)
    if count < bits.numel():
        at = torch.from_numpy(_places(bits.numel()))
        bits = bits[_unravel(at.to(tensor.device), tuple(bits.shape))]
    # a clone, not contiguous(): that keeps the stride of a single element, and a view as bytes needs 1
    return bits.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _unravel(at: torch.Tensor, shape: Ints) -> tuple[torch.Tensor, ...]:
    """Indices per dimension of row-major positions; the tensor itself may have any strides."""
    indices: list[torch.Tensor] = []
    for size in reversed(shape):
        indices.append(at % size)
        at = at // size
    return tuple(reversed(indices))
