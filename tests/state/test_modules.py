# SPDX-License-Identifier: Apache-2.0
"""Modules: plain names whatever wraps them, tied weights, buffers, extra state, hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

from shardckpt.errors import DuplicateName, StateError, TargetMismatch, UnsupportedLeaf
from shardckpt.state import PerRank, capture
from tests.state.memory import load, save


def equal(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def names(module: nn.Module) -> list[str]:
    return [tensor.name for tensor in capture({"m": module}).tensors]


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 3)
        self.b = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))


PLAIN = [f"m/{name}" for name in Layers().state_dict()]


def wrap_all(module: Any) -> Any:
    module.a = torch.compile(module.a)
    module.b[1] = checkpoint_wrapper(module.b[1])
    return torch.compile(module)


def compile_checkpointed(module: Any) -> Any:
    return torch.compile(checkpoint_wrapper(module))


def checkpoint_compiled(module: Any) -> Any:
    compiled: Any = torch.compile(module)
    return checkpoint_wrapper(compiled)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: m,
        torch.compile,
        checkpoint_wrapper,
        compile_checkpointed,
        checkpoint_compiled,
        nn.DataParallel,
        wrap_all,
    ],
    ids=["plain", "compile", "checkpoint", "compile-checkpoint", "checkpoint-compile", "dataparallel", "nested"],
)
def test_names_do_not_depend_on_wrappers(wrap: Any) -> None:
    source = Layers()
    source.b[0].register_buffer("running_mean", torch.full((3,), 3.0))
    target = wrap(Layers())
    assert names(wrap(Layers())) == PLAIN
    done = load(save({"m": wrap(source)}), {"m": target})
    assert not done.missing and not done.unexpected
    assert all(torch.equal(a, b) for a, b in zip(target.state_dict().values(), source.state_dict().values(), strict=True))


def test_compiled_in_place() -> None:
    module = Layers()
    module.compile()
    assert names(module) == PLAIN


def test_the_memory_is_the_modules_own() -> None:
    module = Layers()
    captured = {tensor.name: tensor.data for tensor in capture({"m": module}).tensors}
    assert captured["m/a.weight"].data_ptr() == module.a.weight.data_ptr()
    before = module.a.weight
    load(save({"m": Layers()}), {"m": module})
    assert module.a.weight is before and captured["m/a.weight"].data_ptr() == before.data_ptr()


def test_names_that_are_equal_without_wrappers_are_refused() -> None:
    module = nn.Module()
    module._orig_mod = nn.Linear(1, 1)
    module.weight = nn.Parameter(torch.ones(1))
    outer = nn.Module()
    outer.inner = module
    with pytest.raises(DuplicateName, match=r"inner\._orig_mod\.weight"):
        capture({"m": outer})


class Tied(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def test_tied_weights_are_stored_once() -> None:
    tensors = capture({"m": Tied(True)}).tensors
    assert [(t.name, t.alias_of) for t in tensors] == [("m/embed.weight", None), ("m/head.weight", "m/embed.weight")]


@pytest.mark.parametrize("source", [True, False])
@pytest.mark.parametrize("target", [True, False])
def test_tied_and_untied_load_into_each_other(source: bool, target: bool) -> None:
    saved, loaded = Tied(source), Tied(target)
    done = load(save({"m": saved}), {"m": loaded})
    assert not done.missing and not done.unexpected
    assert torch.equal(loaded.embed.weight, saved.embed.weight)
    if source == target or source:
        assert torch.equal(loaded.head.weight, saved.head.weight)


def test_a_tied_target_needs_only_one_of_the_names() -> None:
    saved, loaded = Tied(False), Tied(True)
    memory = save({"m": saved})
    del memory.whole["m/embed.weight"], memory.tensors["m/embed.weight"]
    done = load(memory, {"m": loaded})
    assert not done.missing
    assert torch.equal(loaded.embed.weight, saved.head.weight)


def test_a_module_and_a_part_of_it_share_tensors() -> None:
    module = Layers()
    tensors = capture({"m": module, "part": module.a}).tensors
    assert [(t.name, t.alias_of) for t in tensors[-2:]] == [("part/weight", "m/a.weight"), ("part/bias", "m/a.bias")]


class Extra(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 1)
        self.value = value

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, state: Any) -> None:
        self.value = state


@pytest.mark.parametrize("wrap", [lambda m: m, torch.compile, checkpoint_wrapper], ids=["plain", "compile", "checkpoint"])
@pytest.mark.parametrize(
    "value",
    [5, {"a": {"b": [1, (2,)]}, "c": None}, [torch.arange(3), "x"], {"t": torch.ones(2, 2)}, {}],
    ids=["int", "dict", "list", "tensor", "empty"],
)
def test_extra_state(wrap: Any, value: Any) -> None:
    module = nn.Sequential(Extra(value), nn.Linear(1, 1))
    target = nn.Sequential(Extra({"other": torch.ones(7)}), nn.Linear(1, 1))
    done = load(save({"m": wrap(module)}), {"m": wrap(target)})
    assert not done.missing and not done.unexpected
    assert str(target[0].value) == str(value) and type(target[0].value) is type(value)


def test_extra_state_that_is_a_tensor_of_another_size() -> None:
    target = Extra(torch.zeros(0, dtype=torch.uint8))
    load(save({"m": Extra(torch.arange(5, dtype=torch.uint8))}), {"m": target})
    assert torch.equal(target.value, torch.arange(5, dtype=torch.uint8))


def test_extra_state_that_is_not_stored_is_refused_or_missing() -> None:
    with pytest.raises(UnsupportedLeaf, match=r"'m/_extra_state/a'"):
        capture({"m": Extra({"a": {1, 2}})})
    target = Extra(5)
    memory = save({"m": nn.Module()})
    assert load(memory, {"m": target}).missing == ["m/_extra_state", "m/inner.bias", "m/inner.weight"]
    assert target.value == 5


class Hooked(nn.Linear):
    """Keeps its weight transposed in checkpoints, by hooks."""

    def __init__(self) -> None:
        super().__init__(2, 3)
        self.register_state_dict_post_hook(lambda m, sd, p, _: sd.update({p + "weight": sd[p + "weight"].t().clone()}))
        self.register_load_state_dict_pre_hook(lambda m, sd, p, *_: sd.update({p + "weight": sd[p + "weight"].t()}))


def test_what_state_dict_hooks_make_is_handed_back_through_load_state_dict() -> None:
    inner, other = Hooked(), Hooked()
    source, target = nn.Sequential(inner), nn.Sequential(other)
    memory = save({"m": source})
    assert memory.whole["m/0.weight"].shape == (2, 3)
    load(memory, {"m": target})
    assert torch.equal(other.weight, inner.weight) and torch.equal(other.bias, inner.bias)


def test_parametrized_modules() -> None:
    source, target = (parametrizations.weight_norm(nn.Linear(2, 3)) for _ in range(2))
    load(save({"m": source}), {"m": target})
    assert torch.equal(source.weight, target.weight)


def test_non_persistent_buffers_are_left_out() -> None:
    module = nn.Module()
    module.register_buffer("a", torch.ones(1))
    module.register_buffer("b", torch.ones(1), persistent=False)
    module.register_buffer("c", None)
    assert names(module) == ["m/a"]


def test_meta_modules_say_what_to_do() -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 2)
    memory = save({"m": nn.Linear(2, 2)})
    with pytest.raises(StateError, match=r"model\.to_empty"):
        load(memory, {"m": module})
    module.to_empty(device="cpu")
    assert not load(memory, {"m": module}).missing


def test_a_buffer_whose_elements_share_memory_cannot_be_filled() -> None:
    module = nn.Module()
    module.register_buffer("positions", torch.zeros(1, 3).expand(4, 3))
    memory = save({"m": module})
    with pytest.raises(StateError, match="several elements of which are one place in memory"):
        load(memory, {"m": module})


def test_a_module_per_rank() -> None:
    source, target = Layers(), Layers()
    memory = save({"m": PerRank(source)})
    assert {name for name, _ in memory.own} == set(PLAIN)
    load(memory, {"m": PerRank(target)})
    assert equal(source, target)
    with pytest.raises(TargetMismatch, match=r"wrap it in shardckpt\.PerRank"):
        load(memory, {"m": target})


def test_missing_and_unexpected_names() -> None:
    memory = save({"m": nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), "other": 1})
    target = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    done = load(memory, {"m": target})
    assert done.missing == ["m/1.bias", "m/1.weight"]
    assert done.unexpected == ["m/2.bias", "m/2.weight"]
