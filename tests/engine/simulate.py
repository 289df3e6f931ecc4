# SPDX-License-Identifier: Apache-2.0
"""Ranks without processes: what each of them would say, write and read, one after the other on one thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from shardckpt.commit import Contents, build_manifest, draft_manifest, publish
from shardckpt.events import Timings
from shardckpt.feed import chunk_size
from shardckpt.header import safetensors_header
from shardckpt.layout import (
    ITEMSIZE,
    GlobalLayout,
    Ints,
    Layout,
    PerRankLayout,
    PerRankShapes,
    Piece,
)
from shardckpt.live import LiveSource
from shardckpt.manifest import rank_file_name, seal
from shardckpt.plan import Plan, PlannedTensor, make_plan
from shardckpt.read import CheckpointFiles, Destination, read_into
from shardckpt.reshard import Want, plan_reads
from shardckpt.stage import FileData, FileMap
from shardckpt.store import Store
from shardckpt.tables import Described, GlobalTensor, encode_table, merge_tables, per_rank_shapes
from shardckpt.validate import Checkpoint, parse_manifest
from shardckpt.write import Receipt, write_rank_file
from tests.layout import brute

ATTEMPT = "0123456789abcdef"
Key = tuple[str, int | None]
"""Name of a whole tensor; with a rank, of what that rank has under a per-rank name."""


def contents(step: int = 7, attempt: str = ATTEMPT) -> Contents:
    """What a manifest says beside tensors and files."""
    return Contents(step=step, attempt=attempt, objects={"n": 1}, containers={}, metadata={}, torch="2.13.0")


def describe(rank: int, layouts: Mapping[str, GlobalLayout | Layout], dtypes: Mapping[str, str]) -> list[Described]:
    """What ``rank`` says of tensors that are laid out like this."""
    described = []
    for name, layout in layouts.items():
        if isinstance(layout, PerRankShapes):
            shape = layout.shape_of(rank)
            if shape is not None:
                described.append(Described(name, dtypes[name], PerRankLayout(shape)))
        elif layout.piece(rank) is not None:
            described.append(Described(name, dtypes[name], layout))
    return described


def merge(tables_of: Sequence[Sequence[Described]], top: Sequence[str] = ("model",)) -> list[GlobalTensor]:
    """What ranks with these descriptions together hold, by way of the tables that they would exchange."""
    encoded = [encode_table(top, described) for described in tables_of]
    distinct = list(dict.fromkeys(encoded))
    table_of = [distinct.index(table) for table in encoded]
    return merge_tables(distinct, table_of, [per_rank_shapes(described) for described in tables_of])


def plan_of(world_size: int, layouts: Mapping[str, GlobalLayout | Layout], dtypes: Mapping[str, str]) -> Plan:
    """The plan that all ranks make of tensors that are laid out like this."""
    return make_plan(world_size, merge([describe(rank, layouts, dtypes) for rank in range(world_size)]))


def random_tensor(dtype: str, shape: Ints, seed: int) -> torch.Tensor:
    """Random bits, so NaNs and negative zeros too."""
    generator = torch.Generator().manual_seed(seed)
    size = prod(shape) * ITEMSIZE[dtype]
    bits = torch.randint(0, 2 if dtype == "bool" else 256, (size,), dtype=torch.uint8, generator=generator)
    return bits.view(getattr(torch, dtype)).view(shape)


def random_tensors(plan: Plan) -> dict[Key, torch.Tensor]:
    """The whole of each tensor of a plan."""
    made: dict[Key, torch.Tensor] = {}
    for number, tensor in enumerate(plan.tensors):
        if isinstance(tensor.layout, PerRankShapes):
            for rank in range(plan.world_size):
                shape = tensor.layout.shape_of(rank)
                if shape is not None:
                    made[tensor.name, rank] = random_tensor(tensor.dtype, shape, 1000 * number + rank)
        else:
            made[tensor.name, None] = random_tensor(tensor.dtype, tensor.layout.shape, number)
    return made


def part(whole: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The elements of ``piece``, in its shape."""
    at = torch.from_numpy(brute.held(piece, tuple(whole.shape)))
    elements = bits(whole).view(-1, whole.element_size())[at]
    return elements.view(-1).view(whole.dtype).view(piece.shape)


def local_tensors(plan: Plan, rank: int, wholes: Mapping[Key, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What ``rank`` holds of each tensor."""
    held = {}
    for tensor in plan.tensors:
        piece = tensor.layout.piece(rank)
        if piece is not None:
            own = rank if isinstance(tensor.layout, PerRankShapes) else None
            held[tensor.name] = part(wholes[tensor.name, own], piece)
    return held


@dataclass(frozen=True)
class Simulated:
    """A checkpoint that simulated ranks have saved."""

    store: Store
    prefix: str
    checkpoint: Checkpoint
    manifest: bytes
    wholes: dict[Key, torch.Tensor]

    def load(self, wants: Sequence[tuple[str, Piece, int | None]], dtype: str | None = None) -> list[torch.Tensor]:
        """What a rank gets that wants these pieces of these tensors (of a per-rank one: of that rank)."""
        planned = [Want(at, self.checkpoint.plan.by_name[name], piece, rank) for at, (name, piece, rank) in enumerate(wants)]
        made = [torch.zeros(want.piece.shape, dtype=getattr(torch, dtype or want.tensor.dtype)) for want in planned]
        self.load_into(planned, {want.key: Destination(made[want.key], want.piece) for want in planned})
        return made

    def load_into(self, wants: Sequence[Want], destinations: Mapping[int, Destination]) -> int:
        """Read into memory that is there already; returns the bytes read."""
        with CheckpointFiles(self.store, self.prefix, self.checkpoint) as files:
            read_into(files, plan_reads(self.checkpoint.plan, wants), destinations, workers=2)
            return files.bytes_read


def write_file(store: Store, name: str, plan: Plan, rank: int, tensors: Mapping[str, torch.Tensor], *, workers: int) -> Receipt:
    """One rank's file, straight from its tensors."""
    pieces = plan.file_pieces(rank)
    source = LiveSource(FileData(FileMap(pieces), tensors), chunk_size(plan.block_size), workers, dict)
    header = safetensors_header(pieces)
    return write_rank_file(store, name, header, source, plan.block_size, workers=workers, timings=Timings())


def write_files(store: Store, plan: Plan, wholes: Mapping[Key, torch.Tensor], prefix: str = "") -> list[Receipt]:
    """Each rank's file; the receipts by rank."""
    return [
        write_file(store, f"{prefix}{rank_file_name(rank, ATTEMPT)}", plan, rank, local_tensors(plan, rank, wholes), workers=2)
        for rank in range(plan.world_size)
    ]


def save(store: Store, plan: Plan, prefix: str = "") -> Simulated:
    """Write and commit random tensors as ``plan`` says."""
    wholes = random_tensors(plan)
    data = manifest_of(plan, write_files(store, plan, wholes, prefix))
    publish(store, prefix, data, ATTEMPT)
    return Simulated(store, prefix, parse_manifest(data), data, wholes)


def manifest_of(plan: Plan, receipts: Sequence[Receipt], attempt: str = ATTEMPT) -> bytes:
    """The manifest that rank 0 builds of receipts."""
    return build_manifest(draft_manifest(plan, contents(attempt=attempt)), receipts)


def resealed(text: bytes) -> bytes:
    """The text of a manifest that was edited, with the checksum that belongs to it."""
    return seal(text[:-34] + text[-2:])


def invented_receipts(plan: Plan, attempt: str = ATTEMPT) -> list[Receipt]:
    """What ranks would say of their files, without files."""
    receipts = []
    for rank, size in enumerate(plan.bytes_by_rank.tolist()):
        blocks = -(-size // plan.block_size)
        name = f"step-00000007/{rank_file_name(rank, attempt)}"
        receipts.append(Receipt(name, 4096 + size, 4096, "0" * 16, b"12345678" * blocks))
    return receipts


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal in dtype, shape and every bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(bits(a), bits(b))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, raveled."""
    dense = tensor.detach().clone(memory_format=torch.contiguous_format)
    return dense.reshape(-1).view(torch.uint8)


def by_hand(
    world_size: int, tensors: Mapping[str, tuple[str, GlobalLayout, tuple[int, int]]], block_size: int | None = None
) -> Plan:
    """A plan with writers of one's own choice: (dtype, layout, writers) by name."""
    planned = [PlannedTensor(name, dtype, layout, writers) for name, (dtype, layout, writers) in tensors.items()]
    return Plan(world_size, planned, {}, block_size)
