# SPDX-License-Identifier: Apache-2.0
"""Parts of jobs, and jobs that have changed: what is documented to work does, and the rest says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import shardckpt
from shardckpt.errors import DtypeMismatch, MissingNames, ShapeMismatch, TargetMismatch
from tests.models import Net, make_job, param_groups, shard, whole
from tests.ranks import RankPool

Found = dict[str, Any]


def save_job(root: str, kind: str) -> Found:
    job = make_job(kind, seed=3)
    job.train(2)
    shardckpt.save(root, job.state(), step=2)
    return parameters(job.model)


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Found]:
    """A FSDP2 job of two ranks, and its parameters."""
    root = str(tmp_path_factory.mktemp("saved") / "c")
    return root, ranks.run(2, save_job, root, "fsdp2")[0]


def parameters(model: nn.Module) -> Found:
    inner = getattr(model, "module", model)
    return {name: whole(param) for name, param in inner.named_parameters()}


def sharded(seed: int, **options: Any) -> Net:
    torch.manual_seed(seed)
    model = Net(**options)
    shard(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def same(found: Found, expected: Found) -> list[str]:
    """Names of which all bits are equal."""
    return sorted(name for name in found.keys() & expected.keys() if torch.equal(found[name], expected[name]))


# ---- parts


def load_keys(root: str, keys: list[str], expected: Found) -> tuple[list[str], int, int, int]:
    job = make_job("fsdp2", seed=50)
    restored = shardckpt.load(root, into=job.state(), keys=keys)
    return same(parameters(job.model), expected), len(job.optimizer.state), job.progress["steps"], restored.info.bytes_needed


def test_the_model_alone(ranks: RankPool, saved: tuple[str, Found]) -> None:
    root, expected = saved
    for names, states, steps, needed in ranks.run(3, load_keys, root, ["model/*"], expected):
        assert names == sorted(expected)
        assert (states, steps) == (0, 0)
        assert needed > sum(tensor.numel() for tensor in expected.values()) * 4


def test_some_layers_alone(ranks: RankPool, saved: tuple[str, Found]) -> None:
    root, expected = saved
    keys = ["model/blocks.0.*", "progress/steps"]
    for names, states, steps, _ in ranks.run(2, load_keys, root, keys, expected):
        assert names == sorted(name for name in expected if name.startswith("blocks.0."))
        assert (states, steps) == (0, 2)


def test_all_but_the_optimizer(ranks: RankPool, saved: tuple[str, Found]) -> None:
    root, expected = saved
    for names, states, steps, _ in ranks.run(2, load_keys, root, ["[!o]*"], expected):
        assert (names, states, steps) == (sorted(expected), 0, 2)


# ---- new and lost layers


def load_with_new_layer(root: str, strict: bool) -> tuple[Found, Found, tuple[str, ...], tuple[str, ...]]:
    model = sharded(60, extra=True)
    before = parameters(model)
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2, foreach=False)
    info = shardckpt.load(root, into={"model": model, "optimizer": optimizer}, strict=strict).info
    return before, parameters(model), info.missing, info.unexpected


def test_new_layers_are_named_and_keep_their_values(ranks: RankPool, saved: tuple[str, Found]) -> None:
    root, expected = saved
    for outcome in ranks.run_expecting_errors(2, load_with_new_layer, root, True):
        assert isinstance(outcome, MissingNames)
        assert {"model/extra.bias", "model/extra.weight"} <= set(outcome.missing)
        assert "strict=False" in str(outcome)
    for before, after, missing, unexpected in ranks.run(2, load_with_new_layer, root, False):
        assert {"model/extra.bias", "model/extra.weight"} <= set(missing)
        assert unexpected == ()
        assert same(after, expected) == sorted(expected)
        assert torch.equal(after["extra.weight"], before["extra.weight"])


class Smaller(nn.Module):
    """A part of the job's model, with the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)


def load_smaller(root: str, strict: bool) -> tuple[Found, tuple[str, ...]]:
    model = Smaller()
    info = shardckpt.load(root, into={"model": model}, strict=strict).info
    return parameters(model), info.unexpected


def test_lost_layers_are_named(ranks: RankPool, saved: tuple[str, Found]) -> None:
    root, expected = saved
    for outcome in ranks.run_expecting_errors(2, load_smaller, root, True):
        assert isinstance(outcome, MissingNames)
        assert "model/blocks.0.up.weight" in outcome.unexpected
        assert not [name for name in outcome.unexpected if not name.startswith("model/")]
    for after, unexpected in ranks.run(2, load_smaller, root, False):
        assert torch.equal(after["embed.weight"], expected["embed.weight"])
        assert "model/blocks.1.norm.bias" in unexpected


# ---- other shapes and dtypes


def load_other_model(root: str, options: dict[str, Any], dtype: torch.dtype, convert: bool) -> Found:
    torch.manual_seed(1)
    model = Net(**options).to(dtype)
    shard(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    shardckpt.load(root, into={"model": model}, convert_dtype=convert)
    return parameters(model)


def test_another_width_is_refused_with_both_shapes(ranks: RankPool, saved: tuple[str, Found]) -> None:
    for outcome in ranks.run_expecting_errors(2, load_other_model, saved[0], {"width": 8}, torch.float32, False):
        assert isinstance(outcome, ShapeMismatch)
        stored, target = outcome.stored, outcome.target
        assert f"has shape {stored} in the checkpoint and {target} in the target" in str(outcome)
        assert (6 in stored, 8 in target) == (True, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_are_converted_when_asked(ranks: RankPool, saved: tuple[str, Found], dtype: torch.dtype) -> None:
    root, expected = saved
    for outcome in ranks.run_expecting_errors(2, load_other_model, root, {}, dtype, False):
        assert isinstance(outcome, DtypeMismatch)
        assert "convert_dtype=True" in str(outcome)
    for found in ranks.run(3, load_other_model, root, {}, dtype, True):
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor.to(dtype)), name


# ---- other optimizers


def load_optimizer(root: str, kind: str, strict: bool) -> dict[str, Any]:
    """Load into a job whose optimizer has changed; what it holds then."""
    model = sharded(70)
    groups = param_groups(model)
    optimizer: torch.optim.Optimizer
    if kind == "SGD":
        optimizer = torch.optim.SGD(groups, lr=0.5, momentum=0.9, foreach=False)
    elif kind == "one group":
        optimizer = torch.optim.AdamW([p for group in groups for p in group["params"]], lr=0.5, foreach=False)
    elif kind == "fewer parameters":
        for param in model.blocks[0].parameters():
            param.requires_grad_(False)
        optimizer = torch.optim.AdamW(param_groups(model), lr=0.5, foreach=False)
    elif kind == "a frozen one thawed":
        model.frozen.requires_grad_(True)
        optimizer = torch.optim.AdamW(param_groups(model), lr=0.5, foreach=False)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.5, foreach=False)
    info = shardckpt.load(root, into={"model": model, "optimizer": optimizer}, strict=strict).info
    return {
        "missing": info.missing,
        "unexpected": info.unexpected,
        "lr": [group["lr"] for group in optimizer.param_groups],
        "states": sum(1 for state in optimizer.state.values() if "exp_avg" in state),
    }


def test_the_same_optimizer_takes_everything(ranks: RankPool, saved: tuple[str, Found]) -> None:
    for found in ranks.run(2, load_optimizer, saved[0], "same", True):
        assert (found["missing"], found["unexpected"]) == ((), ())
        assert found["states"] == 11
        assert found["lr"] != [0.5, 2e-2]


def test_another_kind_of_optimizer_is_refused(ranks: RankPool, saved: tuple[str, Found]) -> None:
    for outcome in ranks.run_expecting_errors(2, load_optimizer, saved[0], "SGD", True):
        assert isinstance(outcome, TargetMismatch)
        assert "the checkpoint has the state of AdamW, the target is SGD" in str(outcome)
        assert "keys=" in str(outcome)


def test_other_param_groups_are_refused(ranks: RankPool, saved: tuple[str, Found]) -> None:
    for outcome in ranks.run_expecting_errors(2, load_optimizer, saved[0], "one group", True):
        assert isinstance(outcome, TargetMismatch)
        assert "group 0 was several groups, which differ in" in str(outcome)
        assert "Group the parameters as they were" in str(outcome)
        assert "keys=" in str(outcome)


def test_a_parameter_that_is_trained_no_more(ranks: RankPool, saved: tuple[str, Found]) -> None:
    """Its state is not wanted, which a strict load says."""
    for outcome in ranks.run_expecting_errors(2, load_optimizer, saved[0], "fewer parameters", True):
        assert isinstance(outcome, MissingNames)
        assert outcome.missing == []
        assert "optimizer/state/blocks.0.up.weight/exp_avg" in outcome.unexpected
    for found in ranks.run(2, load_optimizer, saved[0], "fewer parameters", False):
        assert found["states"] == 6


def test_a_parameter_that_was_frozen(ranks: RankPool, saved: tuple[str, Found]) -> None:
    """It starts without state."""
    for outcome in ranks.run_expecting_errors(2, load_optimizer, saved[0], "a frozen one thawed", True):
        assert isinstance(outcome, MissingNames)
        assert outcome.missing == ["optimizer/group_of/frozen"]
    for found in ranks.run(2, load_optimizer, saved[0], "a frozen one thawed", False):
        assert found["states"] == 11


def test_plain_tensors_for_anybody(saved: tuple[str, Found], tmp_path: Path) -> None:
    """Without torch.distributed, in this very process."""
    root, expected = saved
    state = shardckpt.load(root).state
    assert all(torch.equal(state["model"][name], tensor) for name, tensor in expected.items())
    assert state["progress"]["steps"] == 2
    model = Net()
    shardckpt.load(root, into={"model": model})
    assert same(parameters(model), expected) == sorted(expected)
