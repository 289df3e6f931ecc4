# SPDX-License-Identifier: Apache-2.0
"""Loads on real ranks: names are judged by all ranks together, and an error of one is raised on all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import shardckpt
from shardckpt.errors import (
    ChecksumMismatch,
    DtypeMismatch,
    InvalidManifest,
    MissingFile,
    MissingNames,
    RankFailed,
    ShapeMismatch,
    TruncatedFile,
    UnsupportedVersion,
)
from shardckpt.options import Options
from tests.engine.simulate import resealed
from tests.ranks import RankPool

# ---- names that differ by rank, as those of pipeline stages do


def stage_state(stages: int, filled: bool) -> dict[str, Any]:
    """Layers of one's own stage, sharded over its ranks; a norm that all stages have; a mapping that only stage 0 fills."""
    rank, size = dist.get_rank(), dist.get_world_size()
    per_stage = size // stages
    stage = rank // per_stage
    mesh = init_device_mesh("cpu", (stages, per_stage), mesh_dim_names=("stage", "shard"))["shard"]
    model: dict[str, Any] = {"norm": torch.full((2,), 5.0 * filled)}
    for layer in range(4):
        if layer * stages // 4 == stage:
            whole = (torch.arange(6.0) + 10 * layer) * filled
            model[f"layers.{layer}.weight"] = distribute_tensor(whole, mesh, [Shard(0)])
            model[f"layers.{layer}.scale"] = layer * filled
    return {"model": model, "embed": {"w": torch.ones(3) * filled} if stage == 0 else {}}


def save_stages(root: str, stages: int) -> None:
    shardckpt.save(root, stage_state(stages, True))


def load_stages(root: str, stages: int) -> bool:
    """Load into empty stages; whether they are as if they had been built full."""
    target, expected = stage_state(stages, False), stage_state(stages, True)
    restored = shardckpt.load(root, into=target)
    assert restored.info.unexpected == ()
    for part in ("model", "embed"):
        assert target[part].keys() == expected[part].keys()
        for name, leaf in expected[part].items():
            loaded = target[part][name]
            if isinstance(leaf, DTensor):
                loaded, leaf = loaded.to_local(), leaf.to_local()
            assert torch.equal(loaded, leaf) if isinstance(leaf, torch.Tensor) else loaded == leaf, name
    return True


@pytest.mark.parametrize(("world_size", "stages"), [(2, 2), (4, 2), (4, 4), (2, 1), (1, 1)])
def test_stages_hold_different_names(ranks: RankPool, tmp_path: Path, world_size: int, stages: int) -> None:
    ranks.run(4, save_stages, str(tmp_path / "c"), 2)
    assert all(ranks.run(world_size, load_stages, str(tmp_path / "c"), stages))
    whole = shardckpt.load(tmp_path / "c").state
    assert whole["model"]["layers.3.weight"].tolist() == [30.0, 31.0, 32.0, 33.0, 34.0, 35.0]
    assert whole["model"]["layers.2.scale"] == 2


def load_by_rank(root: str, targets: list[dict[str, Any]], strict: bool) -> tuple[dict[str, Any], Any]:
    target = targets[dist.get_rank()]
    return target, shardckpt.load(root, into=target, strict=strict).info


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    shardckpt.save(tmp_path / "c", {"m": {"a": torch.ones(2), "b": torch.ones(3), "n": 1, "extra": torch.ones(1)}})
    return tmp_path / "c"


def test_names_are_judged_by_all_ranks_together(ranks: RankPool, plain: Path) -> None:
    targets: list[dict[str, Any]] = [
        {"m": {"a": torch.zeros(2), "n": 0, "new": torch.zeros(1)}},
        {"m": {"b": torch.zeros(3)}},
        {},
    ]
    for outcome in ranks.run_expecting_errors(3, load_by_rank, str(plain), targets, True):
        assert isinstance(outcome, MissingNames)
        assert (outcome.missing, outcome.unexpected) == (["m/new"], ["m/extra"])
    found = ranks.run(3, load_by_rank, str(plain), targets, False)
    assert [info.missing for _, info in found] == [("m/new",), (), ()]
    assert [info.unexpected for _, info in found] == [("m/extra",)] * 3
    assert found[0][0]["m"]["a"].tolist() == [1.0, 1.0]
    assert found[0][0]["m"]["n"] == 1
    assert found[1][0]["m"]["b"].tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        ({"a": torch.zeros(5)}, ShapeMismatch, r"'m/a' has shape \[2\] in the checkpoint and \[5\] in the target"),
        ({"a": torch.zeros(2, dtype=torch.int8)}, DtypeMismatch, "'m/a' is float32 in the checkpoint and int8 in the target"),
    ],
)
def test_a_mismatch_on_one_rank_is_raised_on_all(
    ranks: RankPool, plain: Path, bad: dict[str, Any], kind: type[Exception], message: str
) -> None:
    good = {"a": torch.zeros(2), "b": torch.zeros(3), "n": 0, "extra": torch.zeros(1)}
    outcomes = ranks.run_expecting_errors(2, load_by_rank, str(plain), [{"m": good}, {"m": good | bad}], True)
    for outcome in outcomes:
        with pytest.raises(kind, match=message):
            raise outcome


# ---- what each rank has for itself, and states without a target


def own_state(filled: bool) -> dict[str, Any]:
    rank = dist.get_rank() if filled else -1
    own = {"t": torch.full((dist.get_rank() + 1,), float(rank)), "v": {"name": f"rank {rank}", "l": [rank]}, "n": rank}
    return {"own": shardckpt.PerRank(own), "shared": torch.full((5,), 2.0 * filled)}


def save_own(root: str) -> None:
    shardckpt.save(root, own_state(True))


def load_own(root: str, read_once: str) -> tuple[Any, ...]:
    target = own_state(False)
    options = Options(read_once=read_once)  # type: ignore[arg-type]
    restored = shardckpt.load(root, into=target, options=options)
    own = restored.state["own"].value
    assert target["shared"].tolist() == [2.0] * 5
    return own["t"].tolist(), own["v"], own["n"], restored.info.kept


@pytest.mark.parametrize("read_once", ["always", "never"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_rank_gets_its_own(ranks: RankPool, tmp_path: Path, world_size: int, read_once: str) -> None:
    ranks.run(2, save_own, str(tmp_path / "c"))
    for rank, (tensor, value, number, kept) in enumerate(ranks.run(world_size, load_own, str(tmp_path / "c"), read_once)):
        of = rank if rank < 2 else -1
        assert (tensor, value, number) == ([of] * (rank + 1), {"name": f"rank {of}", "l": [of]}, of)
        assert bool(kept) == (rank >= 2)


def load_whole(root: str, read_once: str) -> dict[str, Any]:
    options = Options(read_once=read_once)  # type: ignore[arg-type]
    return dict(shardckpt.load(root, options=options).state)


@pytest.mark.parametrize("read_once", ["always", "never", "auto"])
def test_without_a_target_each_rank_gets_everything(ranks: RankPool, tmp_path: Path, read_once: str) -> None:
    ranks.run(2, save_own, str(tmp_path / "c"))
    for state in ranks.run(3, load_whole, str(tmp_path / "c"), read_once):
        assert state["shared"].tolist() == [2.0] * 5
        assert {rank: tensor.tolist() for rank, tensor in state["own"]["t"].items()} == {0: [0.0], 1: [1.0, 1.0]}
        assert state["own"]["v"]["name"] == {0: "rank 0", 1: "rank 1"}
        assert state["own"]["n"] == {0: 0, 1: 1}


class Stubborn:
    """Takes back its state on rank 0 only."""

    def state_dict(self) -> dict[str, Any]:
        return {"x": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if dist.get_rank():
            raise KeyError("not today")


def load_stubborn(root: str) -> None:
    shardckpt.save(root, {"s": Stubborn(), "t": torch.ones(2)})
    shardckpt.load(root, into={"s": Stubborn(), "t": torch.zeros(2)})


def test_an_object_that_refuses_its_state_on_one_rank(ranks: RankPool, tmp_path: Path) -> None:
    outcomes = ranks.run_expecting_errors(3, load_stubborn, str(tmp_path / "c"))
    assert isinstance(outcomes[0], RankFailed)
    assert "rank 1: KeyError: 'not today'" in str(outcomes[0])
    assert isinstance(outcomes[1], KeyError)


# ---- damage


def save_sharded(root: str, rows: int) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(rows * 100, dtype=torch.float32).view(rows, 100)
    shardckpt.save(root, {"w": distribute_tensor(whole, mesh, [Shard(0)]), "r": torch.arange(1000.0)})


def load_sharded(root: str, rows: int, dim: int, read_once: str) -> tuple[Any, Any]:
    """What this rank gets of a tensor sharded on another dimension, beside what it should get; and the report."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(rows * 100, dtype=torch.float32).view(rows, 100)
    expected = distribute_tensor(whole, mesh, [Shard(dim)]).to_local()
    target = distribute_tensor(torch.zeros(rows, 100), mesh, [Shard(dim)])
    plain = torch.zeros(1000)
    options = Options(read_once=read_once)  # type: ignore[arg-type]
    try:
        info = shardckpt.load(root, into={"w": target, "r": plain}, options=options).info
    except (MissingFile, TruncatedFile):
        assert not target.to_local().any() and not plain.any(), "something was placed before the file was looked at"
        raise
    except ChecksumMismatch:
        local = target.to_local()
        assert ((local == expected) | (local == 0)).all(), "something was placed that is not good"
        raise
    return torch.equal(target.to_local(), expected) and torch.equal(plain, torch.arange(1000.0)), info


@pytest.fixture(scope="module")
def sharded(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sharded") / "c"
    ranks.run(2, save_sharded, str(root), 5000)
    return root


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_reading_once_makes_no_difference(ranks: RankPool, sharded: Path, world_size: int, dim: int) -> None:
    for read_once in ("always", "never", "auto"):
        for equal, info in ranks.run(world_size, load_sharded, str(sharded), 5000, dim, read_once):
            assert equal
            assert info.world_size == 2
            assert info.bytes_needed == 5000 * 400 + world_size * 4000
            if read_once != "auto":
                assert info.read_once == (read_once == "always" and world_size > 1)
            if info.read_once:
                assert info.bytes_read == 5000 * 400 + 4000


@pytest.fixture
def damaged(sharded: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "damaged"
    copy.mkdir()
    for path in sharded.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.mark.parametrize("read_once", ["always", "never"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "swap"])
def test_damage_is_raised_on_all_ranks(ranks: RankPool, damaged: Path, damage: str, read_once: str) -> None:
    first, second = sorted(damaged.glob("rank-*"))
    kind: type[Exception] = ChecksumMismatch
    if damage == "flip":
        data = bytearray(second.read_bytes())
        data[len(data) // 2] ^= 16
        second.write_bytes(data)
    elif damage == "cut":
        kind = TruncatedFile
        second.write_bytes(second.read_bytes()[:-1])
    elif damage == "remove":
        kind = MissingFile
        second.unlink()
    else:
        kind = TruncatedFile
        text = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(text)
    for outcome in ranks.run_expecting_errors(3, load_sharded, str(damaged), 5000, 0, read_once):
        assert isinstance(outcome, kind), outcome
        assert "rank-0000" in str(outcome)
        assert "restore another step" in str(outcome)


@pytest.mark.parametrize(
    ("old", "new", "kind", "message"),
    [
        (b'"version":1', b'"version":2', UnsupportedVersion, "format version 2.*newer"),
        (b'"world_size":2', b'"world_size":3', InvalidManifest, "invalid manifest: files: 2 for 3 ranks"),
        (b'"float32"', b'"float64"', InvalidManifest, "invalid manifest: files.0.*bytes where the tensors need"),
    ],
)
def test_bad_manifests_are_raised_on_all_ranks(
    ranks: RankPool, damaged: Path, old: bytes, new: bytes, kind: type[Exception], message: str
) -> None:
    path = damaged / "manifest.json"
    path.write_bytes(resealed(path.read_bytes().replace(old, new)))
    for outcome in ranks.run_expecting_errors(2, load_sharded, str(damaged), 5000, 0, "auto"):
        with pytest.raises(kind, match=message):
            raise outcome


# ---- how much is read


def save_big(root: str) -> None:
    """Shards of 20 MiB, of which rows of no length are whole blocks, and their optimizer state."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {name: distribute_tensor(torch.full((5001, 2099), 1.5), mesh, [Shard(0)]) for name in ("w", "exp_avg")}
    shardckpt.save(root, state | {"step": torch.tensor(3.0)})


def load_big(root: str, dim: int) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state: dict[str, Any] = {name: distribute_tensor(torch.zeros(5001, 2099), mesh, [Shard(dim)]) for name in ("w", "exp_avg")}
    info = shardckpt.load(root, into=state | {"step": torch.tensor(0.0)}).info
    assert all((state[name].to_local() == 1.5).all() for name in state)
    return info


@pytest.fixture(scope="module")
def big(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("big") / "c"
    ranks.run(2, save_big, str(root))
    return root


@pytest.mark.parametrize(("world_size", "dim"), [(2, 0), (4, 0), (8, 0), (4, 1), (8, 1)])
def test_little_more_than_needed_is_read(ranks: RankPool, big: Path, world_size: int, dim: int) -> None:
    for info in ranks.run(world_size, load_big, str(big), dim):
        assert info.bytes_needed == 2 * 5001 * 2099 * 4 + 4 * world_size
        assert info.bytes_read <= 1.05 * info.bytes_needed


# ---- placements that only DTensor itself can make


def redistribute(root: str, source: list[Any], target: list[Any], shape: tuple[int, ...]) -> bool:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    shardckpt.save(root, {"w": distribute_tensor(whole, mesh, source)})
    loaded = distribute_tensor(torch.zeros_like(whole), mesh, target)
    shardckpt.load(root, into={"w": loaded})
    return torch.equal(loaded.full_tensor(), whole)


@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (0, 3)])
@pytest.mark.parametrize("target", [[Shard(0), Shard(1)], [Replicate(), Shard(0)], [Replicate(), Replicate()]])
@pytest.mark.parametrize("source", [[Shard(0), Shard(0)], [Shard(1), Replicate()], [Shard(1), Shard(0)]])
def test_placements_on_a_2d_mesh(
    ranks: RankPool, tmp_path: Path, source: list[Any], target: list[Any], shape: tuple[int, ...]
) -> None:
    assert all(ranks.run(4, redistribute, str(tmp_path / "c"), source, target, shape))
