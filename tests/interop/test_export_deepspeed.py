# SPDX-License-Identifier: Apache-2.0
"""Exports for DeepSpeed, without DeepSpeed: how parameters are cut, what is refused, what is printed."""

from __future__ import annotations

import json
import pickletools
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardckpt
from shardckpt.errors import AlreadyExists, ConfigError, ExportRefused
from shardckpt.interop.export.content import Content, Window
from shardckpt.interop.export.deepspeed import DeepSpeedExport, export_deepspeed
from shardckpt.interop.export.partitions import partition, partition_size, round_robin, shares, sub_groups
from shardckpt.layout import Mesh, MeshLayout, Replicate
from shardckpt.maintain.parts import Leaf
from shardckpt.maintain.stored import StoredCheckpoint, open_checkpoint
from shardckpt.plan import PlannedTensor
from shardckpt.store import open_store
from tests.cli.run import run

SHAPES = [(3, 5), (1,), (), (7,), (2, 2, 2)]


def leaves() -> list[Leaf]:
    layouts = [MeshLayout(shape, Mesh((0,), (1,)), (Replicate(),)) for shape in SHAPES]
    return [Leaf(PlannedTensor(f"p{at}", "float32", layout)) for at, layout in enumerate(layouts)]


def elements(content: Content) -> list[tuple[str, int] | None]:
    """What each element of a content is: (parameter, position in it), or None for padding."""
    found: list[tuple[str, int] | None] = []
    for span in content.spans:
        if isinstance(span, Window):
            found += [(span.leaf.tensor.name, at) for at in range(span.start, span.stop)]
        else:
            found += [None] * span.numel
    assert len(found) == content.numel
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 20, 40])
def test_groups_are_padded_to_twice_the_world_size_and_cut_equally(world_size: int) -> None:
    every = [(f"p{at}", n) for at, shape in enumerate(SHAPES) for n in range(torch.Size(shape).numel())]
    padded = -(-len(every) // (2 * world_size)) * 2 * world_size
    size = partition_size(leaves(), world_size)
    assert size * world_size == padded
    whole: list[Any] = [*every, *[None] * (padded - len(every))]
    for rank in range(world_size):
        mine = whole[rank * size : (rank + 1) * size]
        assert elements(partition(leaves(), rank, size, "float32", padded=True)) == mine
        lean = [element for element in mine if element is not None]
        assert elements(partition(leaves(), rank, size, "float32", padded=False)) == lean


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 20])
def test_at_stage_3_each_parameter_is_cut_and_padded(world_size: int) -> None:
    for rank in range(world_size):
        expected: list[Any] = []
        for at, shape in enumerate(SHAPES):
            numel = torch.Size(shape).numel()
            share = -(-numel // world_size)
            expected += [(f"p{at}", n) if n < numel else None for n in range(rank * share, (rank + 1) * share)]
        assert elements(shares(leaves(), rank, world_size, "float32")) == expected


def test_sub_groups_end_with_the_parameter_that_fills_them() -> None:
    # 8 + 1 + 1 + 4 + 4 elements on each of 2 ranks
    assert sub_groups(leaves(), 2, 10**9) == [slice(0, 5)]
    assert sub_groups(leaves(), 2, 18) == [slice(0, 5)]
    assert sub_groups(leaves(), 2, 9) == [slice(0, 2), slice(2, 5)]
    assert sub_groups(leaves(), 2, 1) == [slice(at, at + 1) for at in range(5)]
    assert sub_groups([], 2, 9) == []


def test_round_robin_deals_parameters_out_to_ranks() -> None:
    assert round_robin(list("abcdefg"), 3) == list("adgbecf")
    assert round_robin(list("ab"), 4) == ["a", "b"]


ORDER = ["weight", "bias"]


def trained(path: Path, make: Any = torch.optim.AdamW) -> StoredCheckpoint:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = make(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    shardckpt.save(path, {"model": model, "optimizer": optimizer}, step=9)
    return open_checkpoint(open_store(path))


def export(stored: StoredCheckpoint, out: Path, **options: Any) -> DeepSpeedExport:
    chosen: dict[str, Any] = {"stage": 2, "world_size": 2, "dtype": "float32", "order": ORDER, **options}
    return export_deepspeed(stored, str(out), **chosen)


def test_files_name_classes_that_are_not_imported(tmp_path: Path) -> None:
    done = export(trained(tmp_path / "ckpt"), tmp_path / "out", dtype="bfloat16", stage=1)
    assert (tmp_path / "out" / "latest").read_text() == done.tag == "global_step9"
    names = [f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]
    assert sorted(path.name for path in (tmp_path / "out" / done.tag).iterdir()) == sorted(
        ["mp_rank_00_model_states.pt", *names]
    )
    assert [file.file for file in done.files] == ["mp_rank_00_model_states.pt", *names]
    named = set()
    for file in (tmp_path / "out" / done.tag).iterdir():
        with zipfile.ZipFile(file) as archive:
            found = pickletools.genops(archive.read("archive/data.pkl"))
            named |= {str(argument) for opcode, argument, _ in found if opcode.name == "GLOBAL"}
    assert {name.split()[1] for name in named if name.startswith("deepspeed")} == {
        "ZeroStageEnum",
        "fragment_address",
        "LossScaler",
    }
    # 15 elements in 2 parts of 8, each with a master without its padding, and two moments with it; and the bf16 parameters
    assert done.bytes == 15 * 4 + 4 * 8 * 4 + 15 * 2 + 2 * 4
    assert done.notes == ("global_steps is the number of the step, 9",)


def test_the_model_file_is_for_weights_only_loading_too(tmp_path: Path) -> None:
    stored = trained(tmp_path / "ckpt")
    done = export(stored, tmp_path / "out")
    found = torch.load(tmp_path / "out" / done.tag / "mp_rank_00_model_states.pt", weights_only=True)
    assert list(found["param_shapes"][0].items()) == [("weight", torch.Size([3, 4])), ("bias", torch.Size([3]))]
    wanted = shardckpt.load(tmp_path / "ckpt").state["model"]
    assert all(torch.equal(found["module"][name], wanted[name]) for name in ORDER)
    assert (found["dp_world_size"], found["global_steps"], found["frozen_param_shapes"]) == (2, 9, {})


def refuse(stored: StoredCheckpoint, out: Path, match: str, error: type[Exception] = ExportRefused, **options: Any) -> None:
    with pytest.raises(error, match=match):
        export(stored, out, **options)
    assert not (out / "latest").exists() and not list(out.glob("*"))


def test_what_cannot_be_known_is_refused(tmp_path: Path) -> None:
    stored, out = trained(tmp_path / "ckpt"), tmp_path / "out"
    refuse(stored, out, "does not tell in which order", order=None)
    refuse(stored, out, "'bias' is in a param group, and not in the order", order=["weight"])
    refuse(stored, out, "'head' is not in the checkpoint", order=[*ORDER, "head"])
    refuse(stored, out, "a name is there twice", order=["weight", "bias", "bias"])
    refuse(stored, out, "say in which dtype the engine computes", ConfigError, dtype=None)
    refuse(stored, out, "no 'net' at its top", key="net")
    refuse(stored, out, "tag 'a/b' is refused", ConfigError, tag="a/b")
    refuse(stored, out, "tag 'latest' is refused", ConfigError, tag="latest")
    refuse(stored, out, "stages are 1, 2 and 3", ConfigError, stage=0)


def test_what_flat_groups_cannot_hold_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    factored = trained(tmp_path / "factored", torch.optim.Adafactor)
    refuse(factored, out, "is not one element for each element of its parameter")

    model = {"weight": torch.ones(2), "bias": torch.ones(3)}
    steps = {"weight": {"step": torch.tensor(1.0)}, "bias": {"step": torch.tensor(2.0)}}
    optimizer = {"class": "Own", "param_groups": {"0-x": {"lr": 0.1}}, "group_of": dict.fromkeys(model, "0-x"), "state": steps}
    shardckpt.save(tmp_path / "steps", {"model": model, "optimizer": optimizer})
    differing = open_checkpoint(open_store(tmp_path / "steps"))
    refuse(differing, out, "state 'step' of param group 0 differs between 'weight' and 'bias'")

    shardckpt.save(tmp_path / "double", {"model": {"weight": torch.ones(2).double()}, "optimizer": optimizer | {"state": {}}})
    refuse(open_checkpoint(open_store(tmp_path / "double")), out, "'bias' is in a param group", order=["weight"])
    only = optimizer | {"state": {}, "group_of": {"weight": "0-x"}}
    shardckpt.save(tmp_path / "only", {"model": {"weight": torch.ones(2).double()}, "optimizer": only})
    refuse(open_checkpoint(open_store(tmp_path / "only")), out, "'weight' is float64", order=["weight"])


def test_a_tag_that_is_there_is_replaced_only_when_told(tmp_path: Path) -> None:
    stored, out = trained(tmp_path / "ckpt"), tmp_path / "out"
    export(stored, out, tag="a")
    before = (out / "a" / "mp_rank_00_model_states.pt").read_bytes()
    with pytest.raises(AlreadyExists, match="latest"):
        export(stored, out, tag="b")
    export(stored, out, tag="b", replace=True)
    assert sorted(path.name for path in out.iterdir()) == ["a", "b", "latest"]
    assert (out / "latest").read_text() == "b" and (out / "a" / "mp_rank_00_model_states.pt").read_bytes() == before
    export(stored, out, tag="a", replace=True)
    (out / "a" / "notes").write_text("mine")
    with pytest.raises(AlreadyExists, match="also holds 'notes', which would be lost"):
        export(stored, out, tag="a", replace=True)
    assert (out / "a" / "notes").read_text() == "mine"


def test_the_command_takes_the_order_from_a_file(tmp_path: Path) -> None:
    trained(tmp_path / "ckpt")
    (tmp_path / "order").write_text("weight\nbias\n")
    arguments = ("export", "deepspeed", tmp_path / "ckpt", tmp_path / "out", "--stage", "3", "--world-size", "2")
    refused = run(*arguments, "--dtype", "bf16")
    assert refused.status == 1 and "give it with --order" in refused.err
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    no_text = run(*arguments, "--dtype", "bf16", "--order", tmp_path / "binary")
    assert no_text.status == 2 and "it is no text" in no_text.err
    no_dtype = run(*arguments, "--order", tmp_path / "order")
    assert no_dtype.status == 2 and "say in which dtype the engine computes (--dtype)" in no_dtype.err
    plan = run(*arguments, "--dtype", "bf16", "--order", tmp_path / "order", "--dry-run")
    assert plan.status == 0 and "taken for granted: global_steps" in plan.out and "would be written" in plan.out
    assert not (tmp_path / "out").exists()
    done = json.loads(run(*arguments, "--dtype", "bf16", "--order", tmp_path / "order", "--json").out)
    assert (done["tag"], done["stage"], len(done["files"])) == ("global_step9", 3, 4)
    assert (tmp_path / "out" / "latest").read_text() == "global_step9"


MEASURED = """
import resource, sys
from shardckpt.interop.export.deepspeed import export_deepspeed
from shardckpt.maintain.stored import open_checkpoint
from shardckpt.store import open_store

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

before = peak()
stored = open_checkpoint(open_store(sys.argv[1]))
export_deepspeed(stored, sys.argv[2], stage=int(sys.argv[3]), world_size=2, dtype="bfloat16", order=["w", "b"])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path, stage: int) -> None:
    model = {"w": torch.ones(30 << 20), "b": torch.ones(1 << 20)}
    state = {name: {"exp_avg": tensor, "exp_avg_sq": tensor, "step": torch.tensor(1.0)} for name, tensor in model.items()}
    optimizer = {"param_groups": {"0-x": {"lr": 0.1}}, "group_of": dict.fromkeys(model, "0-x"), "state": state}
    shardckpt.save(tmp_path / "ckpt", {"model": model, "optimizer": optimizer})
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "ckpt"), str(tmp_path / "out"), str(stage)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    assert int(done.stdout) < 200 << 20
