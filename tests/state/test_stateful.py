# SPDX-License-Identifier: Apache-2.0
"""Objects with state_dict and load_state_dict, values written back, and what a target wants."""

from __future__ import annotations

import collections
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as sched

from shardckpt.errors import StateError, TargetMismatch, UnsupportedLeaf
from shardckpt.state import PerRank, Whereabouts, capture, open_target
from tests.state.memory import load, save

SCHEDULERS: dict[str, Any] = {
    "lambda": lambda o: sched.LambdaLR(o, lambda step: 0.9**step),
    "multiplicative": lambda o: sched.MultiplicativeLR(o, lambda step: 0.9),
    "step": lambda o: sched.StepLR(o, 2),
    "multistep": lambda o: sched.MultiStepLR(o, [1, 3, 3]),
    "onecycle": lambda o: sched.OneCycleLR(o, max_lr=0.5, total_steps=20),
    "cyclic": lambda o: sched.CyclicLR(o, 0.1, 0.5, cycle_momentum=False),
    "cosine": lambda o: sched.CosineAnnealingLR(o, 10),
    "restarts": lambda o: sched.CosineAnnealingWarmRestarts(o, 3),
    "exponential": lambda o: sched.ExponentialLR(o, 0.9),
    "plateau": lambda o: sched.ReduceLROnPlateau(o, patience=0),
    "sequential": lambda o: sched.SequentialLR(o, [sched.ConstantLR(o), sched.ExponentialLR(o, 0.9)], [2]),
    "chained": lambda o: sched.ChainedScheduler([sched.ConstantLR(o), sched.ExponentialLR(o, 0.9)], optimizer=o),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str) -> None:
    def make() -> dict[str, Any]:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        return {"model": model, "optimizer": optimizer, "scheduler": SCHEDULERS[name](optimizer)}

    def advance(state: dict[str, Any], steps: int) -> list[float]:
        rates = []
        for at in range(steps):
            state["optimizer"].step()
            state["scheduler"].step(*([1.0 + at] if name == "plateau" else []))
            rates.append(state["optimizer"].param_groups[0]["lr"])
        return rates

    source, target = make(), make()
    advance(source, 3)
    done = load(save(source), target)
    assert not done.missing and not done.unexpected
    assert source["scheduler"].state_dict() == target["scheduler"].state_dict()
    assert advance(source, 5) == advance(target, 5)


def test_multistep_keeps_its_counter() -> None:
    model = nn.Linear(1, 1)
    scheduler = sched.MultiStepLR(torch.optim.SGD(model.parameters(), lr=0.1), [1, 3, 3])
    other = sched.MultiStepLR(torch.optim.SGD(model.parameters(), lr=0.1), [2])
    load(save({"s": scheduler}), {"s": other})
    assert type(other.milestones) is collections.Counter and sorted(other.milestones.elements()) == [1, 3, 3]


def test_a_scheduler_with_a_function_in_its_state_is_refused_with_its_path() -> None:
    class Odd:
        def state_dict(self) -> dict[str, Any]:
            return {"a": {"fn": len}}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise AssertionError

    with pytest.raises(UnsupportedLeaf, match="'s/a/fn'"):
        capture({"s": Odd()})


@pytest.mark.parametrize("enabled", [True, False])
def test_grad_scaler(enabled: bool) -> None:
    source, target = (torch.amp.GradScaler("cpu", enabled=enabled, init_scale=scale) for scale in (8.0, 16.0))
    done = load(save({"scaler": source}), {"scaler": target})
    assert not done.missing and not done.unexpected
    assert source.state_dict() == target.state_dict()


class Thing:
    """Has what it is given as its state."""

    def __init__(self, state: Any) -> None:
        self.state = state
        self.asked = 0

    def state_dict(self) -> Any:
        self.asked += 1
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def test_objects_get_all_that_was_stored() -> None:
    # names come back sorted
    stored = {"empty": [], "list": [torch.ones(2), {"x": (1, None)}], "n": {"deep": {1: 2.5}}, "t": torch.arange(3)}
    target = Thing({"other": 1})
    done = load(save({"x": Thing(stored)}), {"x": target})
    assert not done.missing and not done.unexpected
    assert str(target.state) == str(stored)


def test_state_dict_of_a_target_is_not_called_when_only_values_are_stored() -> None:
    target = Thing(None)
    load(save({"x": Thing({"a": 1, "b": [2]})}), {"x": target})
    assert target.state == {"a": 1, "b": [2]} and target.asked == 0


@pytest.mark.parametrize("state", [[1, 2], 5, None, [torch.ones(1), 2], torch.ones(2)], ids=str)
def test_states_that_are_no_mappings(state: Any) -> None:
    target = Thing({"x": 1})
    load(save({"x": Thing(state)}), {"x": target})
    assert str(target.state) == str(state)


def test_tensors_of_the_target_are_filled_where_they_fit() -> None:
    here, small = torch.zeros(3), torch.zeros(1)
    target = Thing({"same": here, "small": small, "dtype": torch.zeros(3, dtype=torch.int64)})
    stored = {"same": torch.ones(3), "small": torch.ones(3), "dtype": torch.ones(3)}
    load(save({"x": Thing(stored)}), {"x": target})
    assert target.state["same"] is here and torch.equal(here, torch.ones(3))
    assert target.state["small"] is not small and torch.equal(target.state["small"], torch.ones(3))
    assert target.state["dtype"].dtype == torch.float32


def test_an_object_of_which_nothing_is_stored_is_missing() -> None:
    target = Thing(3)
    assert load(save({"y": 1}), {"x": target}).missing == ["x"]
    assert target.state == 3


def test_a_part_of_an_object_can_be_loaded() -> None:
    target = Thing({"a": 1, "b": 2, "t": torch.zeros(1)})
    load(save({"x": Thing({"a": 10, "b": 20, "t": torch.ones(1)})}), {"x": target}, select=lambda name: name == "x/a")
    assert target.state == {"a": 10, "b": 2, "t": torch.zeros(1)}
    untouched = Thing({"a": 1})
    load(save({"x": Thing({"a": 10})}), {"x": untouched}, select=lambda name: False)
    assert untouched.state == {"a": 1}


def test_values_are_written_back_into_mutable_mappings() -> None:
    inner: Any = collections.OrderedDict(lr=0.1)
    state = {"n": 1, "inner": inner, "list": [torch.zeros(1), "old"], "frozen": MappingProxyType({"x": 1})}
    stored = {"n": 2, "inner": {"lr": 0.2}, "list": [torch.ones(1), "new"], "frozen": {"x": 2}}
    memory = save(stored)
    target = open_target(state, memory.index(), here=Whereabouts(0, 1))
    memory.fill(target)
    assert state["n"] == 1
    restored = target.finish()
    assert restored is state and state["n"] == 2 and state["inner"] is inner and inner["lr"] == 0.2
    assert state["list"][1] == "new" and state["frozen"] == {"x": 2}


def test_a_state_that_cannot_be_written_to_gives_a_new_one() -> None:
    state = MappingProxyType({"n": 1, "t": torch.zeros(1)})
    memory = save({"n": 2, "t": torch.ones(1)})
    target = open_target(state, memory.index())
    memory.fill(target)
    assert dict(target.finish()) == {"n": 2, "t": torch.ones(1)} and state["n"] == 1


def test_values_of_any_type_replace_each_other() -> None:
    state: dict[str, Any] = {"a": None, "b": [1], "c": {}}
    load(save({"a": {1: 2}, "b": "text", "c": {}}), state)
    assert state == {"a": {1: 2}, "b": "text", "c": {}}


def test_what_is_missing_and_unexpected() -> None:
    memory = save({"a": {"x": 1, "y": torch.ones(1)}, "b": 1, "c": {"z": 3}})
    state: dict[str, Any] = {"a": {"x": 0, "w": 5, "v": torch.zeros(1)}, "new": {"k": 1}}
    done = load(memory, state)
    assert done.missing == ["a/v", "a/w", "new/k"]
    assert done.unexpected == ["a/y"]
    assert state["a"]["x"] == 1 and state["a"]["w"] == 5
    chosen = load(memory, state, select=lambda name: name == "a/x")
    assert not chosen.missing and not chosen.unexpected


def test_tensors_and_values_do_not_replace_each_other() -> None:
    with pytest.raises(TargetMismatch, match="'a': the checkpoint has a tensor there, but the target a int"):
        load(save({"a": torch.ones(1)}), {"a": 1})
    with pytest.raises(TargetMismatch, match="'a': the checkpoint has a value there, but the target a tensor"):
        load(save({"a": 1}), {"a": torch.ones(1)})


def test_what_was_saved_per_rank_has_to_be_loaded_per_rank() -> None:
    memory = save({"v": PerRank(1), "t": PerRank(torch.ones(1)), "o": PerRank(Thing({"a": 1}))})
    for key, leaf in (("v", 0), ("t", torch.zeros(1)), ("o", Thing({}))):
        with pytest.raises(TargetMismatch, match=f"'{key}.*wrap it in shardckpt.PerRank"):
            load(memory, {key: leaf})


def test_what_was_replicated_can_become_per_rank() -> None:
    state = {"v": PerRank(0), "t": PerRank(torch.zeros(1)), "o": PerRank(Thing({}))}
    load(save({"v": 1, "t": torch.ones(1), "o": Thing({"a": 1})}), state)
    assert state["v"].value == 1 and state["t"].value == 1 and state["o"].value.state == {"a": 1}


def test_targets_refuse_what_capture_refuses() -> None:
    with pytest.raises(UnsupportedLeaf, match="'a/b': a set"):
        open_target({"a": {"b": {1}}}, save({"a": {"b": 1}}).index())
    with pytest.raises(StateError, match="mapping with str keys"):
        open_target([], save({}).index())  # type: ignore[arg-type]
