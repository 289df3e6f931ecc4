# SPDX-License-Identifier: Apache-2.0
"""Content digests: equal for equal states from any world size and layout, different for everything else."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

import shardckpt
from shardckpt.errors import ChecksumMismatch, ConfigError
from shardckpt.layout import Mesh, MeshLayout, Shard
from shardckpt.maintain.digest import digest_content
from shardckpt.maintain.parts import PartReader, choose_rounds, cut_batches, list_leaves
from shardckpt.maintain.stored import StoredCheckpoint
from shardckpt.plan import Plan
from shardckpt.store import MemoryStore
from tests.engine.simulate import Simulated, bits, by_hand, save
from tests.engine.strategies import plans
from tests.maintain.make import flip, opened, rank_file, save_plain, tensors, train
from tests.ranks import RankPool

_numbers = itertools.count()


def simulated(plan: Plan) -> tuple[Simulated, StoredCheckpoint]:
    saved = save(MemoryStore(f"digest-{next(_numbers)}"), plan)
    return saved, StoredCheckpoint(saved.store, "", saved.checkpoint)


def test_digest_is_that_of_the_bytes_in_row_major_order(tmp_path: Path) -> None:
    found = digest_content(opened(save_plain(tmp_path)))
    digests = {leaf.name: leaf.digest for leaf in found.tensors}
    for name, tensor in tensors().items():
        assert digests[name.replace("/", "~1")] == xxhash.xxh3_128_hexdigest(bits(tensor).numpy().tobytes())
    assert found.values == 3


def test_world_size_and_layout_make_no_difference(everywhere: dict[str, Path]) -> None:
    found = {layout: digest_content(opened(path)) for layout, path in everywhere.items()}
    plain = found["plain"]
    assert len(plain.tensors) == len(tensors()) + 4
    for layout, other in found.items():
        assert other.digest == plain.digest, layout
        assert other.tensors == plain.tensors, layout
        assert len(other.per_rank) == 2 * opened(everywhere[layout]).checkpoint.manifest.world_size


def test_a_training_state_that_is_restored_and_saved_again_is_the_same(ranks: RankPool, tmp_path: Path) -> None:
    source: str | None = None
    digests = set()
    for world_size in (4, 2, 1, 3):
        url = str(tmp_path / f"of-{world_size}")
        ranks.run(world_size, train, url, source)
        found = digest_content(opened(url))
        assert "optimizer/state/embed.weight/exp_avg" in [leaf.name for leaf in found.tensors]
        digests.add(found.digest)
        source = url
    assert len(digests) == 1


@settings(max_examples=60)
@given(plans())
def test_every_layout_has_the_digest_of_the_whole(plan: Plan) -> None:
    saved, stored = simulated(plan)
    found = digest_content(stored)
    for leaf in (*found.tensors, *found.per_rank):
        whole = saved.wholes[leaf.name, leaf.rank]
        assert leaf.digest == xxhash.xxh3_128_hexdigest(bits(whole).numpy().tobytes())
        assert (leaf.dtype, leaf.shape) == (str(whole.dtype).removeprefix("torch."), tuple(whole.shape))
    assert len(found.tensors) + len(found.per_rank) == len(saved.wholes)


@pytest.mark.slow
@settings(max_examples=60)
@given(plans(), st.integers(1, 40), st.integers(1, 9))
def test_batches_hold_every_byte_once_in_order(plan: Plan, units: int, rounds: int) -> None:
    saved, stored = simulated(plan)
    leaves = list_leaves(plan, plan.by_name, per_rank=True)
    streams = [b""] * len(leaves)
    met = set()
    with PartReader(stored) as reader:
        for batch in cut_batches(leaves, 16 * units, rounds):
            assert sum(part.nbytes for part in batch) <= 16 * units
            for part, data in zip(batch, reader.read(batch), strict=True):
                assert part.leaf is leaves[part.number]
                streams[part.number] += data.tobytes()
                met.add(part.number)
    wholes = [saved.wholes[leaf.tensor.name, leaf.rank] for leaf in leaves]
    assert streams == [bits(whole).numpy().tobytes() for whole in wholes]
    assert met == set(range(len(leaves)))


@pytest.mark.slow
@pytest.mark.parametrize("columns", [1, 4])
def test_blocks_of_many_ranks_are_read_once(columns: int) -> None:
    """Each rank has 2 KiB of each tensor, and a block is 64 KiB: one tensor after the other would read blocks many times."""
    world_size, mib = 32, 1 << 20
    mesh = Mesh(tuple(range(world_size)), (world_size // columns, columns))
    layout = MeshLayout((256, 64), mesh, (Shard(0), Shard(1)))
    plan = by_hand(world_size, {f"t{n:03}": ("float32", layout, (0, 1)) for n in range(64)}, 64 << 10)
    leaves = list_leaves(plan, plan.by_name, per_rank=True)
    assert choose_rounds([(plan, leaves)], 4 * mib) == 1
    assert choose_rounds([(plan, leaves)], mib) > 1
    _, stored = simulated(plan)
    found = digest_content(stored, memory=mib)
    assert found.bytes_read <= 1.05 * plan.total_bytes
    assert found.tensors == digest_content(stored).tensors
    with PartReader(stored) as reader:
        for batch in cut_batches(leaves, mib):
            reader.read(batch)
        assert reader.bytes_read == 2 * plan.total_bytes


def test_memory_changes_nothing_but_reads(tmp_path: Path) -> None:
    shardckpt.save(tmp_path, {"large": torch.randn(3, 700_001), "small": torch.arange(9), "more": torch.randn(200_000)})
    stored = opened(tmp_path)
    much, little = digest_content(stored), digest_content(stored, memory=1 << 20)
    assert replace(little, bytes_read=much.bytes_read) == much
    assert much.bytes_read == stored.checkpoint.plan.total_bytes
    assert little.bytes_read < 1.2 * much.bytes_read
    with pytest.raises(ConfigError, match="memory=1000 bytes is less than 1048576"):
        digest_content(stored, memory=1000)


@pytest.mark.parametrize(
    "changes",
    [
        {"scalar": torch.tensor(-1.5)},
        {"scalar": torch.tensor([1.5])},
        {"scalar": torch.tensor(1.5).view(torch.int32)},
        {"tokens": 8},
        {"tokens": 7.0},
        {"layers": (torch.arange(4), {"x": torch.ones(2)})},
        {"new": torch.zeros(0)},
        {"model": {}},
    ],
    ids=["element", "shape", "dtype", "value", "type", "container", "name", "missing"],
)
def test_any_change_of_content_changes_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    before = digest_content(opened(save_plain(tmp_path / "a")))
    assert digest_content(opened(save_plain(tmp_path / "b"))).digest == before.digest
    assert digest_content(opened(save_plain(tmp_path / "c", changes))).digest != before.digest


def test_step_and_metadata_are_not_content(tmp_path: Path) -> None:
    shardckpt.save(tmp_path / "a", {"x": 1}, step=1, metadata={"by": "a"})
    shardckpt.save(tmp_path / "b", {"x": 1}, step=2)
    assert digest_content(opened(tmp_path / "a")).digest == digest_content(opened(tmp_path / "b")).digest


def test_an_alias_counts_as_the_tensor_it_names(tmp_path: Path) -> None:
    tied = digest_content(opened(save_plain(tmp_path / "tied")))
    names = {leaf.name: leaf.digest for leaf in tied.tensors}
    assert names["model/embed.weight"] == names["model/head.weight"]
    model = {key: tensor.clone() for key, tensor in shardckpt.load(tmp_path / "tied").state["model"].items()}
    assert digest_content(opened(save_plain(tmp_path / "apart", {"model": model}))).digest == tied.digest


def test_what_ranks_have_for_themselves_counts_when_asked_for(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    save_plain(a)
    save_plain(b, {"rng": shardckpt.PerRank({"seed": 6, "state": torch.arange(3)})})
    assert digest_content(opened(a)).digest == digest_content(opened(b)).digest
    one, other = digest_content(opened(a), per_rank=True), digest_content(opened(b), per_rank=True)
    assert one.digest != other.digest
    assert one.per_rank_included
    assert [(leaf.name, leaf.rank) for leaf in one.per_rank] == [("rng/seed", 0), ("rng/state", 0)]
    assert [x.digest == y.digest for x, y in zip(one.per_rank, other.per_rank, strict=True)] == [False, True]


def test_keys_choose_names(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    save_plain(a)
    save_plain(b, {"tokens": 8, "scalar": torch.tensor(2.5)})
    one, other = (digest_content(opened(url), keys=["model/*", "wide*"]) for url in (a, b))
    assert one.digest == other.digest
    assert [leaf.name for leaf in one.tensors] == ["model/embed.weight", "model/head.weight", "wide", "wide~1odd [name]"]
    assert one.values == 0
    # the tensor that the only chosen alias names is read
    alias = digest_content(opened(a), keys=["model/head.weight"])
    assert [leaf.digest for leaf in alias.tensors] == [one.tensors[1].digest]


def test_damage_is_an_error_and_no_digest(tmp_path: Path) -> None:
    save_plain(tmp_path)
    flip(rank_file(tmp_path), -1)
    with pytest.raises(ChecksumMismatch):
        digest_content(opened(tmp_path))


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    shardckpt.save(tmp_path, {"large": torch.randn(3, 700_001)})
    digest_content(opened(tmp_path), memory=1 << 20, progress=lambda done, total: told.append((done, total)))
    assert len(told) == 9
    assert told == sorted(told)
    assert told[-1] == (3 * 700_001 * 4,) * 2
