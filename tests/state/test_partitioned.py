# SPDX-License-Identifier: Apache-2.0
"""Optimizers of flat tensors take the state that plain training saved by parameter, and refuse what they have no room for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardckpt.adapters.owners import PartitionedModel, PartitionedOptimizer, Received
from shardckpt.adapters.wrappers import Slot
from shardckpt.describe import Placed
from shardckpt.errors import TargetMismatch
from shardckpt.guard import owned_by_optimizers
from shardckpt.layout import FlatLayout, Replicated
from tests.state.memory import Memory, load, save

PADDING = 2
"""Elements behind the parameters."""


class Flat:
    """One process whose optimizer updates all parameters of a module as one tensor, with padding at its end."""

    def __init__(self, module: nn.Module, *, only_steps_write: bool = True) -> None:
        self.module = module
        trained = [(name, param) for name, param in module.named_parameters() if param.requires_grad]
        ravel = [*(param.detach().flatten() for _, param in trained), torch.zeros(PADDING)]
        self.flat = nn.Parameter(torch.cat(ravel))
        self.slots, at = [], 0
        for name, param in trained:
            shape = tuple(param.shape)
            layout = FlatLayout(shape, ((0, 0, param.numel()),)) if param.numel() else Replicated(shape)
            self.slots.append(Slot(name, layout, at, param.numel()))
            at += param.numel()
        self.adam = torch.optim.Adam([self.flat], lr=0.25)
        leaves = {
            id(param): Placed(self.flat.data.narrow(0, slot.offset, slot.numel).view(param.shape), slot.layout)
            for (_, param), slot in zip(trained, self.slots, strict=True)
            if slot.layout is not None
        }
        frozen = {name: param for name, param in module.named_parameters() if not param.requires_grad}
        leaves |= {id(param): Placed(param.data, Replicated(tuple(param.shape))) for param in frozen.values()}
        self.state = {
            "model": PartitionedModel(module, leaves, lists_buffers=True),
            "optimizer": PartitionedOptimizer(
                self.adam,
                self.adam.param_groups,
                [(self.flat, self.slots)],
                frozen=frozen,
                only_steps_write=only_steps_write,
            ),
        }

    def step(self) -> None:
        self.flat.grad = torch.arange(1.0, self.flat.numel() + 1)
        self.adam.step()

    def part(self, name: str, key: str) -> torch.Tensor:
        slot = next(slot for slot in self.slots if slot.fqn == name)
        found: torch.Tensor = self.adam.state[self.flat][key].narrow(0, slot.offset, slot.numel)
        return found


class Numbers(nn.Module):
    """A parameter that is a single number comes first."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a = nn.Parameter(torch.rand(()))
        self.b = nn.Parameter(torch.rand(3, 2))
        self.c = nn.Parameter(torch.rand(4))
        self.empty = nn.Parameter(torch.rand(0, 3))
        self.frozen = nn.Parameter(torch.rand(2), requires_grad=False)


def plain(*trained: str, steps: dict[str, int] | None = None) -> tuple[Numbers, torch.optim.Adam, Memory]:
    """What plain training saves that has stepped over the parameters named, frozen ones being in its group."""
    module = Numbers(5)
    adam = torch.optim.Adam(module.parameters(), lr=0.5)
    for name in trained:
        param = module.get_parameter(name)
        for _ in range((steps or {}).get(name, 3)):
            module.zero_grad()
            param.grad = torch.full_like(param, 0.5)
            adam.step()
    return module, adam, save({"model": module, "optimizer": adam})


def test_plain_training_goes_on_flat_and_back() -> None:
    module, adam, memory = plain("a", "b", "c", "empty")
    target = Flat(Numbers(6))
    assert not load(memory, target.state).missing and not load(memory, target.state).unexpected
    for name in ("a", "b", "c"):
        param = module.get_parameter(name)
        assert torch.equal(target.part(name, "exp_avg"), adam.state[param]["exp_avg"].flatten())
        slot = next(slot for slot in target.slots if slot.fqn == name)
        assert torch.equal(target.flat.data.narrow(0, slot.offset, slot.numel), param.data.flatten())
    state = target.adam.state[target.flat]
    assert state["exp_avg"].shape == target.flat.shape and state["step"] == 3 and not state["exp_avg"][-PADDING:].any()
    assert target.adam.param_groups[0]["lr"] == 0.5
    back = Numbers(7)
    again = torch.optim.Adam(back.parameters())
    load(save(target.state), {"model": back, "optimizer": again})
    assert all(torch.equal(again.state[p][key], adam.state[q][key]) for p, q in ((back.a, module.a), (back.b, module.b))
               for key in ("step", "exp_avg", "exp_avg_sq"))  # fmt: skip


def test_steps_that_differ_are_refused() -> None:
    _, _, memory = plain("a", "b", "c", "empty", steps={"c": 2})
    with pytest.raises(TargetMismatch, match=r"'step' is 3\.0 for 'a' and 2\.0 for 'c' in the checkpoint"):
        load(memory, Flat(Numbers()).state)


def test_parameters_without_stored_state_begin_anew() -> None:
    _, _, memory = plain("a", "b")
    target = Flat(Numbers())
    target.step()
    assert target.part("c", "exp_avg").any()
    load(memory, target.state)
    assert not target.part("c", "exp_avg").any() and target.part("b", "exp_avg").any()


def test_a_model_takes_what_there_is_when_it_is_not_strict() -> None:
    _, _, memory = plain("a")
    wider = nn.Module()
    wider.b, wider.more = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.ones(2))
    leaves = {id(param): Placed(param.data, Replicated(tuple(param.shape))) for param in wider.parameters()}
    found = load(memory, {"model": PartitionedModel(wider, leaves, lists_buffers=True)})
    assert found.missing == ["model/more"] and set(found.unexpected) == {"model/a", "model/c", "model/empty", "model/frozen"}
    found = load(memory, {"model": PartitionedModel(wider, leaves, lists_buffers=True, strict=False)})
    assert not found.missing and not found.unexpected
    assert torch.equal(wider.b, Numbers(5).b) and wider.more.tolist() == [1, 1]


def test_received_takes_what_is_stored_and_misses_nothing() -> None:
    memory = save({"notes": {"epoch": 3, "seen": torch.arange(2)}})
    notes, other = Received(), Received()
    found = load(memory, {"notes": notes, "other": other})
    assert notes.value["epoch"] == 3 and notes.value["seen"].tolist() == [0, 1] and other.value is None
    assert not found.missing and not found.unexpected


def test_what_optimizers_own_is_told_apart() -> None:
    target = Flat(Numbers())
    target.step()
    average = target.adam.state[target.flat]["exp_avg"]
    owned = owned_by_optimizers(target.state)
    assert owned(target.flat.data[3:5]) and owned(average) and not owned(target.module.frozen.data)  # type: ignore[arg-type]
    apart = Flat(Numbers(), only_steps_write=False)
    assert not owned_by_optimizers(apart.state)(apart.flat.data)
