# SPDX-License-Identifier: Apache-2.0
"""Optimizers: state by parameter name, put back bit for bit, and training goes on as if it had not stopped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from shardckpt.adapters.allocate import StateAllocator, zero_step_state
from shardckpt.errors import DuplicateName, StateError, TargetMismatch, UnsupportedLeaf
from shardckpt.layout import Mesh, MeshLayout, Replicate
from shardckpt.state import PerRank, StoredTensor, capture, open_target
from tests.state.memory import bits, load, save

Make = Callable[[nn.Sequential], torch.optim.Optimizer]
optim = torch.optim


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 2))
    weight(model, 3).requires_grad_(False)
    return model


def weight(model: nn.Sequential, at: int) -> torch.Tensor:
    """The weight of a linear layer."""
    return next(model[at].parameters())


def loss(model: nn.Module, optimizer: torch.optim.Optimizer, at: int) -> Any:
    optimizer.zero_grad()
    value = model(torch.linspace(-1, 1, 12).view(4, 3) + at).pow(2).sum()
    value.backward()
    return value


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for at in range(steps):
        optimizer.step(partial(loss, model, optimizer, at))


def two_groups(model: nn.Sequential) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": [weight(model, 0)], "lr": 0.1},
        {"params": [*model[2].parameters(), weight(model, 3)]},
    ]
    return optim.AdamW(groups)


def all_params(kind: Any, **options: Any) -> Make:
    return lambda model: kind(model.parameters(), **options)


OPTIMIZERS: dict[str, Make] = {
    "adam": all_params(optim.Adam, amsgrad=True),
    "adamw": all_params(optim.AdamW),
    "adamw fused": all_params(optim.AdamW, fused=True),
    "adamw tensor lr": all_params(optim.AdamW, lr=torch.tensor(1e-2), foreach=False),
    "adam tensor betas": all_params(optim.Adam, lr=0.1, betas=(torch.tensor(0.9), torch.tensor(0.99)), foreach=False),
    "two groups": two_groups,
    "sgd": all_params(optim.SGD, lr=0.01),
    "sgd momentum": all_params(optim.SGD, lr=0.01, momentum=0.9, nesterov=True),
    "adafactor": all_params(optim.Adafactor),
    "adagrad": all_params(optim.Adagrad),
    "adadelta": all_params(optim.Adadelta),
    "adamax": all_params(optim.Adamax),
    "asgd": all_params(optim.ASGD),
    "nadam": all_params(optim.NAdam),
    "radam": all_params(optim.RAdam),
    "rmsprop": all_params(optim.RMSprop, momentum=0.9, centered=True),
    "rprop": all_params(optim.Rprop),
    "lbfgs": lambda model: optim.LBFGS([p for p in model.parameters() if p.requires_grad], max_iter=3, history_size=3),
}
if hasattr(optim, "Muon"):
    OPTIMIZERS["muon"] = lambda model: optim.Muon([weight(model, 0), weight(model, 2)])


def flat_state(optimizer: torch.optim.Optimizer) -> Any:
    """All of an optimizer's state, comparable bit for bit."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (str(value.dtype), tuple(value.shape), str(value.device), bits(value))
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return type(value)(map(plain, value)) if isinstance(value, list | tuple) else value

    return plain(optimizer.state_dict())


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    for ours, theirs in zip(a.parameters(), b.parameters(), strict=True):
        assert bits(ours) == bits(theirs)


@pytest.mark.parametrize("steps_before", [0, 2], ids=["fresh", "used"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_if_it_had_not_stopped(name: str, steps_before: int) -> None:
    model = net(1)
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, 3)
    memory = save({"model": model, "optimizer": optimizer})
    other = net(2)
    target = OPTIMIZERS[name](other)
    train(other, target, steps_before)
    done = load(memory, {"model": other, "optimizer": target})
    assert not done.missing and not done.unexpected
    assert flat_state(target) == flat_state(optimizer)
    train(model, optimizer, 3)
    train(other, target, 3)
    assert flat_state(target) == flat_state(optimizer)
    assert_same_weights(model, other)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_capturing_changes_nothing(name: str) -> None:
    model = net(1)
    optimizer = OPTIMIZERS[name](model)
    for steps in (0, 2):
        train(model, optimizer, steps)
        before = copy.deepcopy(flat_state(optimizer)), [p.grad for p in model.parameters()]
        capture({"model": model, "optimizer": optimizer})
        assert (flat_state(optimizer), [p.grad for p in model.parameters()]) == before


def test_names_are_by_parameter() -> None:
    model = net(1)
    optimizer = two_groups(model)
    train(model, optimizer, 1)
    captured = capture({"net": {"inner": model}, "opt": optimizer})
    names = [tensor.name for tensor in captured.tensors if tensor.name.startswith("opt")]
    assert names[:3] == ["opt/state/0.weight/step", "opt/state/0.weight/exp_avg", "opt/state/0.weight/exp_avg_sq"]
    groups = {name: value for name, value in captured.values.items() if "group_of" in name}
    assert set(groups) == {f"opt/group_of/{name}" for name in ("0.weight", "2.weight", "2.bias", "3.weight")}
    first, second = groups["opt/group_of/0.weight"], groups["opt/group_of/3.weight"]
    assert captured.values[f"opt/param_groups/{first}/lr"] == 0.1
    assert captured.values[f"opt/param_groups/{second}/lr"] == 1e-3


def test_state_that_was_not_saved_is_removed() -> None:
    model = net(1)
    memory = save({"model": model, "optimizer": optim.Adam(model.parameters())})
    optimizer = optim.Adam(model.parameters())
    train(model, optimizer, 1)
    done = load(memory, {"model": model, "optimizer": optimizer})
    assert not optimizer.state and not done.missing and not done.unexpected


def test_hyperparameters_come_from_the_checkpoint_and_newer_ones_stay() -> None:
    model = net(1)
    source = optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.25)
    memory = save({"model": model, "optimizer": source})
    target = optim.AdamW(model.parameters())
    target.param_groups[0]["added_later"] = "stays"
    load(memory, {"model": model, "optimizer": target})
    group = target.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["added_later"]) == (0.5, 0.25, "stays")
    assert group["betas"] == (0.9, 0.999) and type(group["betas"]) is tuple


def test_tensor_learning_rates_are_filled_in_place() -> None:
    model = net(1)
    for stored in (torch.tensor(0.5), 0.25):
        memory = save({"model": model, "optimizer": optim.AdamW(model.parameters(), lr=stored, foreach=False)})
        lr = torch.tensor(1.0)
        target = optim.AdamW(model.parameters(), lr=lr, foreach=False)
        load(memory, {"model": model, "optimizer": target})
        assert target.param_groups[0]["lr"] is lr and float(lr) == float(stored)


def test_parameters_of_another_dtype_keep_the_dtype_of_their_state() -> None:
    model = net(1).bfloat16()
    optimizer = optim.Adam(model.parameters())
    for param in model.parameters():
        optimizer.state[param] = {"step": torch.tensor(2.0), "exp_avg": torch.randn(param.shape, dtype=torch.float32)}
    memory = save({"model": model, "optimizer": optimizer})
    target = optim.Adam(model.parameters())
    load(memory, {"model": model, "optimizer": target})
    assert flat_state(target) == flat_state(optimizer)


def test_a_changed_kind_of_optimizer_is_refused() -> None:
    model = net(1)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 1)
    memory = save({"model": model, "optimizer": optimizer})
    with pytest.raises(TargetMismatch, match=r"'optimizer': the checkpoint has the state of SGD, the target is Adam\..*betas"):
        load(memory, {"model": model, "optimizer": optim.Adam(model.parameters())})
    state = {"model": model, "optimizer": optim.Adam(model.parameters())}
    load(memory, state, select=lambda name: not name.startswith("optimizer"))
    assert not state["optimizer"].state  # type: ignore[attr-defined]


def test_adam_and_adamw_load_into_each_other() -> None:
    model = net(1)
    optimizer = optim.Adam(model.parameters())
    train(model, optimizer, 1)
    target = optim.AdamW(model.parameters())
    load(save({"model": model, "optimizer": optimizer}), {"model": model, "optimizer": target})
    assert flat_state(target)["state"] == flat_state(optimizer)["state"]


def test_groups_that_were_split_or_merged_are_refused() -> None:
    model = net(1)
    state = {"model": model, "optimizer": two_groups(model)}
    memory = save(state)
    merged = optim.AdamW([weight(model, 0), *model[2].parameters(), weight(model, 3)])
    with pytest.raises(TargetMismatch, match=r"group 0 was several.*differ in 'lr'\. Stored: 0-.*target: 0: 0\.weight"):
        load(memory, {"model": model, "optimizer": merged})
    one = save({"model": model, "optimizer": merged})
    with pytest.raises(TargetMismatch, match="groups 0 and 1 were one group"):
        load(one, state)
    load(one, state, select=lambda name: "param_groups" not in name)


def test_stages_of_a_pipeline_become_one_optimizer_and_the_other_way_round() -> None:
    whole = net(1)
    first, last = optim.AdamW(whole[0].parameters()), optim.AdamW(whole[2:].parameters())
    for _ in range(2):
        whole(torch.ones(1, 3)).sum().backward()
        first.step()
        last.step()
    both = optim.AdamW(whole.parameters())
    memory = save({"model": whole, "optimizer": first})
    other = save({"model": whole, "optimizer": last})
    for field in ("whole", "tensors", "values"):
        getattr(memory, field).update(getattr(other, field))
    done = load(memory, {"model": whole, "optimizer": both})
    assert not done.missing and not done.unexpected
    assert set(both.state) == {*first.state, *last.state}
    stage = optim.AdamW(whole[2:].parameters(), lr=5.0)
    done = load(save({"model": whole, "optimizer": both}), {"model": whole, "optimizer": stage})
    assert not done.missing
    assert all(name.startswith(("optimizer/state/0.", "optimizer/group_of/0.")) for name in done.unexpected)
    assert flat_state(stage) == flat_state(last)


def test_new_parameters_are_missing_and_keep_what_they_have() -> None:
    model = net(1)
    optimizer = optim.Adam(model[0].parameters(), lr=0.5)
    train(model, optimizer, 1)
    memory = save({"model": model, "optimizer": optimizer})
    target = optim.Adam(model.parameters())
    done = load(memory, {"model": model, "optimizer": target})
    assert done.missing == [f"optimizer/group_of/{name}" for name in ("2.bias", "2.weight", "3.bias")], "3.weight is frozen"
    assert set(target.state) == set(model[0].parameters()) and target.param_groups[0]["lr"] == 0.5


def test_a_part_of_the_state_can_be_loaded() -> None:
    model = net(1)
    optimizer = optim.Adam(model.parameters())
    train(model, optimizer, 2)
    memory = save({"model": model, "optimizer": optimizer})
    target = optim.Adam(model.parameters(), lr=0.7)
    train(model, target, 1)
    avg, square = target.state[weight(model, 0)]["exp_avg"], target.state[weight(model, 0)]["exp_avg_sq"].clone()
    load(memory, {"model": model, "optimizer": target}, select=lambda name: name.endswith("/exp_avg"))
    entry = target.state[weight(model, 0)]
    assert torch.equal(entry["exp_avg"], optimizer.state[weight(model, 0)]["exp_avg"]) and entry["exp_avg"] is avg
    assert torch.equal(entry["exp_avg_sq"], square) and entry["step"] == 1 and target.param_groups[0]["lr"] == 0.7


def test_where_names_come_from() -> None:
    model = net(1)
    first = weight(model, 0)
    by_tensor = capture({"nested": {"w": first}, "opt": optim.SGD([first], lr=0.1)})
    assert "opt/group_of/nested.w" in by_tensor.values
    named = optim.SGD(torch.compile(model).named_parameters(), lr=0.1)  # type: ignore[attr-defined]
    assert "opt/group_of/2.bias" in capture({"opt": named}).values
    part = {"part": model[2], "model": model, "opt": optim.SGD(model.parameters(), lr=0.1)}
    assert "opt/group_of/2.bias" in capture(part).values
    with pytest.raises(StateError, match=r"'opt': parameter 1 of a group.*\(shape \(5,\)\).*next to the optimizer"):
        capture({"model": nn.ModuleList([nn.Linear(1, 1)]), "w": first, "opt": optim.SGD(model[0].parameters(), lr=0.1)})


def test_one_optimizer_for_several_modules() -> None:
    gen, disc = net(1), net(2)
    params = [*gen.parameters(), *disc.parameters()]
    source = optim.Adam(params)
    (gen(torch.ones(1, 3)) + disc(torch.ones(1, 3))).sum().backward()
    source.step()
    state = {"gen": gen, "disc": disc, "opt": source}
    assert "opt/state/disc.0.weight/exp_avg" in {tensor.name for tensor in capture(state).tensors}
    target = optim.Adam(params)
    load(save(state), {**state, "opt": target})
    assert flat_state(target) == flat_state(source)


def test_parameters_with_one_name_are_refused() -> None:
    a, b = net(1), net(2)
    params = [("same", weight(a, 0)), ("same", weight(b, 0))]
    groups = [{"params": [param], "param_names": [name]} for name, param in params]
    optimizer = optim.SGD([{"params": [param]} for _, param in params], lr=0.1)
    for group, named in zip(optimizer.param_groups, groups, strict=True):
        group["param_names"] = named["param_names"]
    with pytest.raises(DuplicateName, match="'same'"):
        capture({"opt": optimizer})


def test_tied_parameters_go_by_their_first_name() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    assert "opt/group_of/embed.weight" in capture({"m": model, "opt": optim.SGD(model.parameters(), lr=0.1)}).values


def test_hyperparameters_that_are_not_values_are_refused() -> None:
    model = net(1)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["schedule"] = lambda step: step
    with pytest.raises(UnsupportedLeaf, match=r"'opt/param_groups/0-[0-9a-f]{8}/schedule': a function"):
        capture({"m": model, "opt": optimizer})


def test_state_of_a_parameter_that_is_in_no_group_is_refused() -> None:
    model = net(1)
    optimizer = optim.Adam(model.parameters())
    train(model, optimizer, 1)
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]
    with pytest.raises(StateError, match="in none of its param groups"):
        capture({"m": model, "opt": optimizer})


def test_nothing_changes_before_finish() -> None:
    model = net(1)
    optimizer = optim.Adam(model.parameters())
    train(model, optimizer, 1)
    memory = save({"model": model, "optimizer": optimizer})
    target = optim.Adam(model.parameters(), lr=0.9)
    open_target({"model": model, "optimizer": target}, memory.index())
    assert not target.state and target.param_groups[0]["lr"] == 0.9


def test_optimizer_state_that_is_keyed_by_other_things_than_parameters() -> None:
    model = net(1)
    source, target = (optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    source.state["global"] = {"count": 3, "t": torch.ones(2)}  # type: ignore[index]
    load(save({"m": model, "opt": source}), {"m": model, "opt": target})
    assert target.state["global"]["count"] == 3 and torch.equal(target.state["global"]["t"], torch.ones(2))  # type: ignore[index]


def test_an_optimizer_per_rank() -> None:
    model, other = net(1), net(2)
    source, target = optim.Adam(model.parameters(), lr=0.5), optim.Adam(other.parameters())
    train(model, source, 2)
    memory = save({"p": PerRank({"model": model, "optimizer": source})})
    done = load(memory, {"p": PerRank({"model": other, "optimizer": target})})
    assert not done.missing and not done.unexpected
    assert flat_state(target) == flat_state(source)
    assert_same_weights(model, other)


@pytest.mark.parametrize(("option", "device"), [("foreach", "cpu"), ("capturable", "meta"), ("fused", "meta")])
def test_new_step_counters_lie_where_torch_puts_them(option: str, device: str) -> None:
    param = torch.empty(3, 2, device="meta")
    allocate = StateAllocator(optim.Adam([param]), {"params": [param], option: True}, param, "o/state/p", 0)
    number = StoredTensor("float32", MeshLayout((), Mesh((0,), (1,)), (Replicate(),)))
    assert allocate("o/state/p/step", number).device.type == device
    assert allocate("o/state/p/mu_product", number).device.type == "meta"
    odd = StoredTensor("int8", MeshLayout((4, 5), Mesh((0,), (1,)), (Replicate(),)))
    made = allocate("o/state/p/deep/er", odd)
    assert (made.shape, made.dtype, made.device.type) == ((4, 5), torch.int8, "meta")


def test_the_stand_in_step_touches_nothing() -> None:
    model = net(1)
    optimizer = optim.AdamW(model.parameters(), lr=0.5)
    train(model, optimizer, 1)
    before = flat_state(optimizer), [bits(p) for p in model.parameters()], [p.grad for p in model.parameters()]
    ran: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: ran.append(1))
    made = zero_step_state(optimizer, optimizer.param_groups[0], weight(model, 0))
    assert made["exp_avg"].shape == (5, 3) and not ran
    after = flat_state(optimizer), [bits(p) for p in model.parameters()], [p.grad for p in model.parameters()]
    assert before == after and set(optimizer.state) <= set(model.parameters())
