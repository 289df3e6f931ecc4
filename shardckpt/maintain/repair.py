# SPDX-License-Identifier: Apache-2.0
"""Repair: plan what lost and damaged files of a checkpoint can be rebuilt from, and do it.

A file is rebuilt block by block, of its own blocks that are good and of those of the others in its group, into a new file that
takes its place at once when all of it matches the manifest's digests. So nothing that is good is ever overwritten, and what
is damaged stays as it is until its replacement is durable. Then the damaged file is gone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from shardckpt.buffer import CHUNK, Buffer, BufferPool
from shardckpt.checksum import damaged_blocks, digests_between
from shardckpt.crew import share_out
from shardckpt.errors import CheckpointError, ChecksumMismatch
from shardckpt.header import safetensors_header
from shardckpt.manifest import MANIFEST_NAME
from shardckpt.parity.layout import parity_record_name
from shardckpt.parity.record import Parity, find_parity, member_body
from shardckpt.parity.xor import Body, Others
from shardckpt.store import FileReader, FileWriter, Store

from .damage import Damage, find_damage
from .stored import WORKERS, Progress, StoredCheckpoint, committed_prefixes, no_progress, open_checkpoint


@dataclass(frozen=True, slots=True)
class Repair:
    """One file that is not as it was written."""

    file: str
    """Its name in the store."""
    problem: str
    """What is wrong with it."""
    sources: tuple[str, ...]
    """Files that its lost blocks are rebuilt from; none when what is good of it, and the manifest, are enough."""
    obstacle: str | None
    """Why it cannot be repaired; None when it can."""
    work: _Work | None
    """For `carry_out`."""


@dataclass(frozen=True, slots=True)
class _Work:
    body: Body
    header: bytes
    others: tuple[Body, ...]
    damage: Damage
    block_size: int


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """What is to be done with one checkpoint."""

    path: str
    """Where it is; `shardckpt.load` takes it."""
    step: int | None
    """Number of the training step; None when the manifest cannot be read."""
    repairs: tuple[Repair, ...]
    """Files that are not as they were written, rank files first; empty when all is well."""


def plan_repairs(store: Store, *, workers: int = WORKERS, progress: Progress = no_progress) -> list[RepairPlan]:
    """Read everything of the checkpoint in a store, or of all committed steps of a root, and plan what to do.

    Raises `CheckpointNotFound` when there is none, and `StoreError` when the store cannot be listed.
    """
    plans: list[RepairPlan] = []
    prefixes = committed_prefixes(store)
    for done, prefix in enumerate(prefixes):
        progress(done, len(prefixes))
        try:
            stored = open_checkpoint(store, prefix)
        except CheckpointError as error:
            obstacle = "nothing can be rebuilt without the manifest: restore another step, and prune this one"
            repair = Repair(f"{prefix}{MANIFEST_NAME}", error.message, (), obstacle, None)
            plans.append(RepairPlan(f"{store.url}/{prefix}".rstrip("/"), None, (repair,)))
        else:
            plans.append(_plan(stored, workers))
    return plans


def _plan(stored: StoredCheckpoint, workers: int) -> RepairPlan:
    store, checkpoint, prefix = stored.store, stored.checkpoint, stored.prefix
    repairs: list[Repair] = []
    parity: Parity | None = None
    without = "it has no parity"
    try:
        parity = find_parity(store, prefix, checkpoint)
    except CheckpointError as error:
        without = "the record of its parity is damaged"
        name = f"{prefix}{parity_record_name(checkpoint.manifest.attempt)}"
        repairs.append(Repair(name, error.message, (), "remove it; the checkpoint is then one without parity", None))
    if parity is None:
        groups = [[member_body(prefix, file)] for file in checkpoint.manifest.files]
    else:
        groups = [parity.bodies(number) for number in range(len(parity.record.groups))]
    headers = {f"{prefix}{file.name}": rank for rank, file in enumerate(checkpoint.manifest.files)}
    for bodies in groups:
        found: dict[Body, tuple[bytes, Damage]] = {}
        for body in bodies:
            rank = headers.get(body.name)
            header = b"" if rank is None else safetensors_header(tuple(checkpoint.plan.lay_out(rank)))
            damage = find_damage(store, body, header, checkpoint.plan.block_size, workers=workers)
            if damage is not None:
                found[body] = header, damage
        repairs += _plan_group(bodies, found, checkpoint.plan.block_size, without)
    return RepairPlan(stored.url, checkpoint.manifest.step, tuple(repairs))


def _plan_group(bodies: list[Body], found: dict[Body, tuple[bytes, Damage]], block_size: int, without: str) -> Iterator[Repair]:
    """Repairs of the damaged ones of a group. Each place beside each other can do without one block."""
    lost = {body: {body.start // block_size + number for number in damage.blocks} for body, (_, damage) in found.items()}
    times = Counter(place for places in lost.values() for place in places)
    for body, (header, damage) in found.items():
        others = tuple(other for other in bodies if other is not body)
        obstacle = None
        if lost[body] and not others:
            obstacle = without
        elif any(times[place] > 1 for place in lost[body]):
            rivals = [other.name for other in lost if other is not body and lost[other] & lost[body]]
            obstacle = f"{', '.join(rivals)} of the same group is damaged in the same places"
        ends = {other: range(other.start // block_size, -(-other.stop // block_size)) for other in others}
        sources = tuple(other.name for other in others if any(place in ends[other] for place in lost[body]))
        yield Repair(body.name, damage.message, sources, obstacle, _Work(body, header, others, damage, block_size))


def carry_out(store: Store, repair: Repair, *, workers: int = WORKERS) -> None:
    """Rebuild one file as planned, put it into its place, and read it back.

    Raises `CheckpointError` when that fails; then the file is as it was before, or rebuilt.
    """
    work = repair.work
    if work is None or repair.obstacle is not None:
        raise ChecksumMismatch(f"{repair.file} in {store.url} cannot be repaired: {repair.obstacle}", name=repair.file)
    body = work.body
    with Others(store, work.others, work.block_size) as others, store.replace(body.name, body.size) as writer:
        if work.header:
            header = Buffer(len(work.header))
            header.bytes[:] = work.header
            writer.write_at(0, header.bytes)
        _Rebuilding(store, work, others, writer).run(workers)
        writer.finish()
    left = find_damage(store, body, work.header, work.block_size, workers=workers)
    if left is not None:
        raise ChecksumMismatch(
            f"{repair.file} in {store.url} was rebuilt, but reads differently: {left.message}", name=repair.file
        )


class _Rebuilding:
    """Writes the body of a file anew."""

    def __init__(self, store: Store, work: _Work, others: Others, writer: FileWriter) -> None:
        self._store = store
        self._work = work
        self._others = others
        self._writer = writer
        self._chunk = max(CHUNK, work.block_size)

    def run(self, workers: int) -> None:
        body = self._work.body
        length = body.size - body.offset
        blocks = -(-length // self._work.block_size)
        starts = range(0, length, self._chunk)
        pool = BufferPool(2 * workers, self._chunk)
        if len(self._work.damage.blocks) == blocks:
            share_out(lambda start: self._write(start, None, pool), starts, workers, "shardckpt-repair")
            return
        with self._store.open(body.name) as reader:
            share_out(lambda start: self._write(start, reader, pool), starts, workers, "shardckpt-repair")

    def _write(self, start: int, reader: FileReader | None, pool: BufferPool) -> None:
        body, size = self._work.body, self._work.block_size
        stop = min(start + self._chunk, body.size - body.offset)
        padded = -(-(stop - start) // self._writer.alignment) * self._writer.alignment
        with pool.borrow() as buffer, pool.borrow() as scratch:
            for at in range(start, stop, size):
                end = min(at + size, stop)
                if reader is None or at // size in self._work.damage.blocks:
                    self._others.combine(body.start + at, body.start + end, buffer.bytes[at - start :], scratch.bytes)
                else:
                    reader.read_at(body.offset + at, [buffer.bytes[at - start : end - start]])
            wanted = digests_between(body.digests, start, stop, size)
            if damaged_blocks(buffer.bytes[: stop - start], size, wanted):
                raise ChecksumMismatch(
                    f"what the others in {self._store.url} give for {body.name} does not match its digests", name=body.name
                )
            self._writer.write_at(body.offset + start, buffer.bytes[:padded])
