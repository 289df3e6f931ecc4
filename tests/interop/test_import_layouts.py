# SPDX-License-Identifier: Apache-2.0
"""Layouts of files that DeepSpeed 0.19.8 does not write here by itself, made by hand; and what an import takes of memory."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shardckpt
from shardckpt.errors import CheckpointNotFound, InvalidForeignCheckpoint, MissingFile, UnsupportedForeignCheckpoint
from shardckpt.interop.deepspeed import import_deepspeed, load

SHAPES = {"a": (3, 5), "b": (4,), "c": ()}
WORLD = 2


def weights(offset: float = 0.0) -> dict[str, Tensor]:
    return {
        name: torch.rand(shape, generator=torch.Generator().manual_seed(at)) + offset
        for at, (name, shape) in enumerate(SHAPES.items())
    }


def write_model(place: Path, *, stage: int = 1, **more: Any) -> None:
    place.mkdir(parents=True, exist_ok=True)
    shapes = [OrderedDict((name, torch.Size(shape)) for name, shape in SHAPES.items())]
    module = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in SHAPES.items()}
    model = {"module": module, "param_shapes": shapes, "global_steps": 9, "dp_world_size": WORLD, "ds_version": "0.9.0"}
    model |= {"buffer_names": [], "shared_params": {}, "lr_scheduler": None, **more}
    names = [f"zero_pp_rank_{rank}_" for rank in range(WORLD)] if stage == 3 else [""]
    for name in names:
        torch.save(model, place / f"{name}mp_rank_00_model_states.pt")


def write_partitions(
    place: Path,
    *,
    gap: int = 0,
    name: str = "zero_pp_rank_{}_mp_rank_00_optim_states.pt",
    elastic: bool = False,
    params: Sequence[Any] = (0,),
) -> None:
    """Stage 1, with ``gap`` elements behind each parameter but the last; ``params`` are those that the group names."""

    def flat(found: dict[str, Tensor]) -> Tensor:
        parts = [torch.cat([value.flatten(), torch.zeros(gap)]) for value in found.values()]
        joined = torch.cat(parts)[: sum(map(len, parts)) - gap]
        return torch.nn.functional.pad(joined, (0, -len(joined) % (2 * WORLD)))

    master, moment = flat(weights()), flat(weights(7.0))
    size, padding = len(master) // WORLD, len(master) - sum(v.numel() for v in weights().values()) - 2 * gap
    for rank in range(WORLD):
        own = slice(rank * size, (rank + 1) * size)
        lean = size - (padding if rank == WORLD - 1 else 0)
        state = {"exp_avg": moment[own].clone(), "step": torch.tensor(9.0)}
        groups = [{"lr": 0.1, "params": [*params]}]
        inner: dict[str, Any] = {
            "base_optimizer_state": [state] if elastic else {"state": {0: state}, "param_groups": groups},
            "single_partition_of_fp32_groups": [master[own][:lean].clone()],
            "zero_stage": 1,
            "partition_count": [WORLD],
        }
        if gap:
            inner["param_alignment_paddings"] = [[gap, gap, 0]]
        torch.save({"optimizer_state_dict": inner}, place / name.format(rank))


def check(state: Any) -> None:
    for name, value in weights().items():
        assert torch.equal(state["model"][name], value)
        assert torch.equal(state["optimizer"]["state"][name]["exp_avg"], weights(7.0)[name])
        assert state["optimizer"]["state"][name]["step"].item() == 9.0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gap": 3},
        {"elastic": True},
        {"name": "zero_pp_rank_{}_mp_rank_00optim_states.pt"},
        {"name": "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"},
    ],
)
def test_partitions_of_all_versions_are_put_together(tmp_path: Path, options: dict[str, Any]) -> None:
    write_model(tmp_path / "tag")
    write_partitions(tmp_path / "tag", **options)
    (tmp_path / "latest").write_text("tag")
    check(load(tmp_path).state)
    check(load(tmp_path / "tag").state)
    assert load(tmp_path, tag="tag").state["deepspeed"]["global_steps"] == 9
    import_deepspeed(tmp_path, tmp_path / "root")
    check(shardckpt.load(tmp_path / "root").state)


@pytest.mark.parametrize("bare", [False, True])
def test_universal_checkpoints_are_read(tmp_path: Path, bare: bool) -> None:
    place = tmp_path / "tag_universal"
    write_model(place, stage=3 if bare else 1)
    for name, value in weights().items():
        (place / "zero" / name).mkdir(parents=True)
        for key, tensor in {"fp32": value, "exp_avg": weights(7.0)[name]}.items():
            torch.save(tensor.flatten() if bare else {"param": tensor, "cat_dim": 0}, place / "zero" / name / f"{key}.pt")
        torch.save(torch.tensor(9.0), place / "zero" / name / "step.pt")
    torch.save(
        {"zero_stage": 3 if bare else 1, "param_groups": [{"lr": 0.1, "params": [0]}]}, place / "zero" / "optimizer_state.pt"
    )
    (tmp_path / "latest_universal").write_text("tag_universal")
    check(load(tmp_path).state)
    (place / "zero" / "b" / "fp32.pt").unlink()
    with pytest.raises(MissingFile, match=r"zero/b/fp32\.pt"):
        load(tmp_path)


def test_files_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="latest"):
        load(tmp_path)
    write_model(tmp_path / "tag")
    write_partitions(tmp_path / "tag")
    (tmp_path / "latest").write_text("gone")
    with pytest.raises(CheckpointNotFound, match="gone"):
        load(tmp_path)
    last = tmp_path / "tag" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    found = torch.load(last, weights_only=False)
    found["optimizer_state_dict"]["single_partition_of_fp32_groups"][0] = torch.zeros(3)
    torch.save(found, last)
    with pytest.raises(InvalidForeignCheckpoint):
        load(tmp_path, tag="tag")
    last.unlink()
    with pytest.raises(InvalidForeignCheckpoint, match="2 ranks"):
        load(tmp_path, tag="tag")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("layer_01-model_00-model_states.pt", "pipeline"),
        ("layer_0_expert_1_mp_rank_00_model_states.pt", "MoE"),
        ("mp_rank_01_model_states.pt", "tensor parallel"),
        ("zero_pp_rank_0_mp_rank_01_optim_states.pt", "tensor parallel"),
    ],
)
def test_other_kinds_of_parallelism_are_refused_by_name(tmp_path: Path, name: str, what: str) -> None:
    write_model(tmp_path / "tag")
    write_partitions(tmp_path / "tag")
    (tmp_path / "tag" / name).write_bytes(b"")
    with pytest.raises(UnsupportedForeignCheckpoint, match=what):
        load(tmp_path, tag="tag")


@pytest.mark.parametrize("inner", [{}, {"single_partition_of_fp32_groups": [1]}, {"partition_count": "x"}, [], None])
def test_partitions_of_other_shapes_are_refused(tmp_path: Path, inner: Any) -> None:
    write_model(tmp_path / "tag")
    for rank in range(WORLD):
        torch.save({"optimizer_state_dict": inner}, tmp_path / "tag" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    with pytest.raises(InvalidForeignCheckpoint):
        load(tmp_path, tag="tag")


def test_training_without_zero_is_refused_with_the_remedy(tmp_path: Path) -> None:
    write_model(tmp_path / "tag")
    with pytest.raises(UnsupportedForeignCheckpoint, match="ZeRO stage 1"):
        load(tmp_path, tag="tag")


MEASURE = """
import sys, torch
from shardckpt.interop.deepspeed import import_deepspeed
def peak():  # not ru_maxrss, which begins with that of the process that started this one
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
import_deepspeed(sys.argv[1], sys.argv[2])
print(peak() - before)
"""


@pytest.mark.slow
def test_an_import_takes_no_more_memory_for_a_larger_model(tmp_path: Path) -> None:
    numel = 100_000_000
    place = tmp_path / "tag"
    place.mkdir()
    shapes = [{"a": torch.Size((numel // 1000, 1000))}]
    torch.save({"module": {}, "param_shapes": shapes, "global_steps": 1}, place / "mp_rank_00_model_states.pt")
    state = {"state": {0: {"exp_avg": torch.zeros(numel)}}, "param_groups": [{"params": [0]}]}
    inner = {"base_optimizer_state": state, "single_partition_of_fp32_groups": [torch.ones(numel)], "partition_count": [1]}
    torch.save({"optimizer_state_dict": {**inner, "zero_stage": 1}}, place / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(tmp_path / "root")]
    (tmp_path / "latest").write_text("tag")
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=280).stdout)
    assert grown < 250 << 20, f"{grown / 1e6:.0f} MB for a model of {8 * numel / 1e6:.0f} MB"
    written = sum(file.stat().st_size for file in (tmp_path / "root").rglob("*") if file.is_file())
    assert written < 1.01 * 8 * numel
