# SPDX-License-Identifier: Apache-2.0
"""The manifest: small, canonical, and enough to compute the plan again."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings

from shardckpt.commit import read_manifest_bytes
from shardckpt.errors import DigestRefused, InvalidManifest, MissingFile, StoreError
from shardckpt.layout import Mesh, MeshLayout, PerRankShapes, Replicate, Shard
from shardckpt.manifest import (
    FILE_PATTERN,
    MANIFEST_LIMIT,
    MANIFEST_NAME,
    STEP_PATTERN,
    manifest_digest,
    rank_file_name,
    step_directory,
)
from shardckpt.plan import Plan, make_plan
from shardckpt.store import LocalStore, MemoryStore
from shardckpt.tables import GlobalTensor
from shardckpt.validate import parse_manifest
from tests.engine.simulate import ATTEMPT, by_hand, invented_receipts, manifest_of, save
from tests.engine.strategies import plans
from tests.engine.test_plan import llama, with_adam


@pytest.mark.slow
@settings(max_examples=200)
@given(plans())
def test_the_plan_follows_from_the_manifest(plan: Plan) -> None:
    data = manifest_of(plan, invented_receipts(plan))
    again = parse_manifest(data).plan
    assert again.tensors == plan.tensors
    assert again.block_size == plan.block_size
    assert again.bytes_by_rank.tolist() == plan.bytes_by_rank.tolist()
    for rank in range(plan.world_size):
        assert again.file_pieces(rank) == plan.file_pieces(rank)


def test_a_manifest_says_all_there_is_to_say() -> None:
    plan = by_hand(2, {"x": ("float32", MeshLayout((4,), Mesh((0, 1), (2,)), (Shard(0),)), (0, 1))})
    plan.aliases["y"] = "x"
    saved = save(MemoryStore("says-all"), plan)
    document = json.loads(saved.manifest)
    assert document.pop("created").startswith("20")
    assert document.pop("shardckpt")
    files = document.pop("files")
    covered = saved.manifest[: -len('0123456789abcdef0123456789abcdef"}')]
    assert document.pop("checksum") == xxhash.xxh3_128_hexdigest(covered)
    assert document == {
        "format": "shardckpt",
        "version": 1,
        "attempt": ATTEMPT,
        "step": 7,
        "world_size": 2,
        "block_size": 65536,
        "meshes": [{"shape": [2], "strides": [1]}],
        "layouts": [{"mesh": 0, "placements": ["S0"]}],
        "tensors": {"x": {"dtype": "float32", "shape": [4], "layout": 0}, "y": {"alias": "x"}},
        "objects": {"n": 1},
        "containers": {},
        "torch": "2.13.0",
    }
    assert [file["name"] for file in files] == [f"rank-0000{rank}-{ATTEMPT}.safetensors" for rank in range(2)]
    assert [(file["size"], file["data"]) for file in files] == [(4104, 4096)] * 2
    assert saved.checkpoint.plan.aliases == {"y": "x"}
    assert saved.checkpoint.digest == manifest_digest(saved.manifest) == hashlib.sha256(saved.manifest).hexdigest()


def test_digests_are_handed_out_per_file() -> None:
    plan = by_hand(2, {"x": ("uint8", MeshLayout((150_000,), Mesh((0, 1), (2,)), (Shard(0),)), (0, 1))}, 1 << 16)
    checkpoint = save(MemoryStore("digests"), plan).checkpoint
    assert [len(digests) for digests in checkpoint.digests] == [16, 16]


def test_receipts_that_do_not_fit_the_plan_are_refused() -> None:
    plan = by_hand(2, {"x": ("float32", MeshLayout((4,), Mesh((0, 1), (2,)), (Shard(0),)), (0, 1))})
    good = invented_receipts(plan)
    with pytest.raises(InvalidManifest, match=r"files\[1\]: rank 0 in the place of rank 1|is not of attempt"):
        manifest_of(plan, [good[0], good[0]])
    with pytest.raises(InvalidManifest, match="files: 1 for 2 ranks"):
        manifest_of(plan, good[:1])
    with pytest.raises(InvalidManifest, match="is not of attempt"):
        manifest_of(plan, good, "feedfeedfeedfeed")


def test_a_large_job_has_a_small_manifest() -> None:
    """Llama 3 70B with Adam on 1,024 ranks."""
    world = 1024
    mesh = Mesh(tuple(range(world)), (world,))
    begun = time.perf_counter()
    plan = make_plan(world, with_adam(llama(80, 8192, 28672), mesh, (Shard(0),)))
    data = manifest_of(plan, invented_receipts(plan))
    parse_manifest(data)
    seconds = time.perf_counter() - begun
    assert len(data) < 2_000_000
    assert seconds < 10, "a generous bound: it takes some tenths of a second"


def test_many_ranks_with_tensors_of_their_own() -> None:
    world = 512
    tensors = [GlobalTensor(f"rng/{i}", "uint8", PerRankShapes(((5000,),))) for i in range(3)]
    everywhere = MeshLayout((), Mesh(tuple(range(world)), (world,)), (Replicate(),))
    plan = make_plan(world, [*tensors, GlobalTensor("step", "int64", everywhere)])
    data = manifest_of(plan, invented_receipts(plan))
    assert len(data) < 400 * world
    assert parse_manifest(data).plan.tensors == plan.tensors


# ---- reading it


def test_a_manifest_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / MANIFEST_NAME, "wb") as file:
        file.truncate(MANIFEST_LIMIT + 1)
    with pytest.raises(StoreError, match="more than the 268435456 that are read at most"):
        read_manifest_bytes(LocalStore(tmp_path), "")


def test_a_manifest_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFile):
        read_manifest_bytes(LocalStore(tmp_path), "step-00000001/")


def test_only_the_expected_manifest_is_taken() -> None:
    saved = save(MemoryStore("expected"), by_hand(1, {}))
    digest = saved.checkpoint.digest
    assert (
        read_manifest_bytes(saved.store, "", digest) == read_manifest_bytes(saved.store, "", digest.upper()) == saved.manifest
    )
    with pytest.raises(DigestRefused, match=f"has SHA-256 {digest}, not the expected {'0' * 64}") as caught:
        read_manifest_bytes(saved.store, "", "0" * 64)
    assert caught.value.got == digest


# ---- names


def test_names_of_steps_and_files() -> None:
    assert step_directory(7) == "step-00000007"
    assert step_directory(10**17) == "step-100000000000000000"
    for step in (0, 7, 12345678, 10**18 - 1):
        found = STEP_PATTERN.match(step_directory(step))
        assert found is not None
        assert int(found[1]) == step
    assert FILE_PATTERN.match(rank_file_name(16383, ATTEMPT))


@pytest.mark.parametrize(
    "name",
    ["step-1", "step-0000000a", "step-00000001\n", "Step-00000001", "step-٠٠٠٠٠٠٠١", "step-00000001/", " step-00000001"],
)
def test_other_names_are_no_steps(name: str) -> None:
    assert STEP_PATTERN.match(name) is None
