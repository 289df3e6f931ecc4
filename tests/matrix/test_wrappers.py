# SPDX-License-Identifier: Apache-2.0
"""Wrappers do not show in a checkpoint, and models without memory get theirs from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import shardckpt
from shardckpt.errors import StateError
from tests.models import Block, Net, shard
from tests.ranks import RankPool

PLAIN = sorted(Net().state_dict())


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, foreach=False)


def compile_module(module: nn.Module) -> nn.Module:
    made: Any = torch.compile(module, backend="eager")
    assert isinstance(made, nn.Module)
    return made


def compiled(model: Net) -> nn.Module:
    return compile_module(model)


def compiled_blocks(model: Net) -> nn.Module:
    for at, block in enumerate(model.blocks):
        model.blocks[at] = compile_module(block)
    return model


def checkpointed_blocks(model: Net) -> nn.Module:
    for at, block in enumerate(model.blocks):
        model.blocks[at] = checkpoint_wrapper(block)
    return model


def checkpointed_and_sharded(model: Net) -> nn.Module:
    checkpointed_blocks(model)
    shard(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def sharded_and_compiled(model: Net) -> nn.Module:
    shard(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    return compiled_blocks(model)


def ddp(model: Net) -> nn.Module:
    return DistributedDataParallel(model)


def compiled_ddp(model: Net) -> nn.Module:
    return compile_module(DistributedDataParallel(model))


def fsdp1(model: Net) -> nn.Module:
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
        ignored_states=[model.frozen],
    )


def fsdp1_flat(model: Net) -> nn.Module:
    return FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy({Block}), device_id=torch.device("cpu"), ignored_states=[model.frozen]
    )


WRAPPERS = {
    function.__name__: function
    for function in (
        compiled,
        compiled_blocks,
        checkpointed_blocks,
        checkpointed_and_sharded,
        sharded_and_compiled,
        ddp,
        compiled_ddp,
        fsdp1,
        fsdp1_flat,
    )
}


def build(wrapper: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = WRAPPERS[wrapper](Net())
    return model, optimizer_of(model)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(1)
    x = torch.arange(20).view(4, 5) % 11
    nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def save_wrapped(wrapper: str, root: str) -> None:
    model, optimizer = build(wrapper, 1)
    step(model, optimizer)
    shardckpt.save(root, {"model": model, "optimizer": optimizer})


def save_again(wrapper: str, root: str, copy: str) -> None:
    """Load into another wrapped model, and save that."""
    model, optimizer = build(wrapper, 2)
    step(model, optimizer)
    shardckpt.load(root, into={"model": model, "optimizer": optimizer})
    shardckpt.save(copy, {"model": model, "optimizer": optimizer})


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Leaves by name."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {name: leaf for key, item in tree.items() for name, leaf in flat(item, f"{path}/{key}").items()}


def check_same(one: Path, other: Path) -> None:
    a, b = flat(shardckpt.load(one).state), flat(shardckpt.load(other).state)
    assert a.keys() == b.keys()
    for name, leaf in a.items():
        if isinstance(leaf, torch.Tensor):
            assert torch.equal(leaf, b[name]), name
        else:
            assert leaf == b[name], name


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_do_not_change_names(ranks: RankPool, tmp_path: Path, wrapper: str) -> None:
    ranks.run(2, save_wrapped, wrapper, str(tmp_path / "c"), timeout=120)
    state = shardckpt.load(tmp_path / "c").state
    assert sorted(state["model"]) == PLAIN
    assert state["optimizer"]["state"].keys() < set(PLAIN)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("compiled", "ddp"),
        ("fsdp1", "checkpointed_and_sharded"),
        ("sharded_and_compiled", "fsdp1_flat"),
        ("fsdp1_flat", "compiled_blocks"),
        ("checkpointed_blocks", "fsdp1"),
    ],
)
def test_wrapped_models_are_loaded_into_otherwise_wrapped_ones(
    ranks: RankPool, tmp_path: Path, source: str, target: str
) -> None:
    ranks.run(2, save_wrapped, source, str(tmp_path / "c"), timeout=120)
    ranks.run(3, save_again, target, str(tmp_path / "c"), str(tmp_path / "again"), timeout=120)
    check_same(tmp_path / "c", tmp_path / "again")


# ---- models without memory


def restore_from_meta(root: str, copy: str, kind: str) -> None:
    """As large models are made: on the meta device, sharded, given memory, filled from the checkpoint."""
    with torch.device("meta"):
        model = Net()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    if kind == "without memory":
        shardckpt.load(root, into={"model": model})
    model.to_empty(device="cpu")
    optimizer = optimizer_of(model)
    shardckpt.load(root, into={"model": model, "optimizer": optimizer})
    assert isinstance(model.embed.weight, DTensor)
    assert model.head.weight is model.embed.weight
    shardckpt.save(copy, {"model": model, "optimizer": optimizer})


def test_a_model_on_the_meta_device_is_filled(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_wrapped, "ddp", str(tmp_path / "c"))
    ranks.run(3, restore_from_meta, str(tmp_path / "c"), str(tmp_path / "again"), "")
    check_same(tmp_path / "c", tmp_path / "again")


def test_a_model_without_memory_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_wrapped, "ddp", str(tmp_path / "c"))
    outcomes = ranks.run_expecting_errors(2, restore_from_meta, str(tmp_path / "c"), "", "without memory")
    for outcome in outcomes:
        assert isinstance(outcome, StateError)
        assert "model.to_empty(device=...), after fully_shard" in str(outcome)
