# SPDX-License-Identifier: Apache-2.0
"""`load_for_inference` in one process: dtypes, the meta device, names, tied weights, buffers, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardckpt
from shardckpt import InferenceConfig
from tests.models import Net

Tensors = dict[str, torch.Tensor]


def net(seed: int) -> Net:
    torch.manual_seed(seed)
    model = Net()
    model.calls += seed
    return model


def meta_net() -> Net:
    with torch.device("meta"):
        return Net()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[str, Tensors]:
    """A model, beside an optimizer and a model that was averaged."""
    model = net(1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3, dtype=torch.int64)).sum().backward()
    optimizer.step()
    state = {"model": model, "optimizer": optimizer, "ema": {"model": net(7), "decay": 0.9}}
    shardckpt.save(tmp_path / "saved", state, step=4)
    return str(tmp_path / "saved"), tensors(model)


def tensors(model: nn.Module) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(found: nn.Module, expected: Tensors) -> bool:
    now = tensors(found)
    return now.keys() == expected.keys() and all(torch.equal(now[name], tensor) for name, tensor in expected.items())


def test_a_plain_model_is_filled_in_place(saved: tuple[str, Tensors]) -> None:
    url, expected = saved
    model = net(2)
    memory = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    restored = shardckpt.load_for_inference(url, model)
    assert restored.step == 4
    assert restored.state["model"] is model
    assert same(model, expected)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == memory
    assert not any(module.training for module in model.modules())
    assert [name for name, param in model.named_parameters() if not param.requires_grad] == ["frozen"]
    assert (restored.info.missing, restored.info.unexpected) == ((), ())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("make", [lambda: net(2), meta_net])
def test_floating_point_is_converted_and_integers_stay(saved: tuple[str, Tensors], make: Any, dtype: torch.dtype) -> None:
    url, expected = saved
    model = make()
    shardckpt.load_for_inference(url, model, InferenceConfig(dtype=dtype))
    assert same(model, {name: t.to(dtype) if t.is_floating_point() else t for name, t in expected.items()})
    assert (model.scale.dtype, model.calls.dtype) == (dtype, torch.int64)
    assert model.head.weight is model.embed.weight
    assert model(torch.ones(1, 2, dtype=torch.int64)).dtype == dtype


def test_a_model_of_another_dtype_keeps_it(saved: tuple[str, Tensors]) -> None:
    url, expected = saved
    model = net(2).to(torch.bfloat16)
    shardckpt.load_for_inference(url, model)
    assert same(model, {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in expected.items()})


def test_a_model_on_the_meta_device_gets_its_memory(saved: tuple[str, Tensors]) -> None:
    url, expected = saved
    model = meta_net()
    shardckpt.load_for_inference(url, model)
    assert same(model, expected)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert model.head.weight is model.embed.weight
    assert [name for name, param in model.named_parameters() if not param.requires_grad] == ["frozen"]
    reference = net(2)
    reference.load_state_dict(expected)
    x = torch.arange(6).view(2, 3)
    assert torch.equal(model(x), reference.eval()(x))


def test_a_part_on_the_meta_device_gets_memory_and_the_rest_is_filled(saved: tuple[str, Tensors]) -> None:
    url, expected = saved
    model = net(2)
    model.blocks[0].to("meta")
    kept = model.blocks[1].up.weight  # type: ignore[union-attr]
    shardckpt.load_for_inference(url, model, InferenceConfig(device="cpu"))
    assert same(model, expected)
    assert model.blocks[1].up.weight is kept  # type: ignore[union-attr]


def test_another_key_and_the_default_config(saved: tuple[str, Tensors]) -> None:
    url, _ = saved
    config = dataclasses.replace(shardckpt.default_inference_config(), key="ema/model")
    model = net(2)
    restored = shardckpt.load_for_inference(url, model, config)
    assert same(model, tensors(net(7)))
    assert restored.state["ema"]["model"] is model
    assert shardckpt.default_inference_config() == InferenceConfig()


def test_a_key_that_is_not_there_is_told_with_those_that_are(saved: tuple[str, Tensors]) -> None:
    for strict in (True, False):
        with pytest.raises(shardckpt.MissingNames, match="weights"):
            shardckpt.load_for_inference(saved[0], net(2), InferenceConfig(key="weights", strict=strict))


def test_only_the_expected_manifest_is_loaded(tmp_path: Path) -> None:
    done = shardckpt.save(tmp_path / "a", {"model": net(1)})
    shardckpt.load_for_inference(tmp_path / "a", net(2), InferenceConfig(expect_digest=done.digest))
    with pytest.raises(shardckpt.DigestRefused):
        shardckpt.load_for_inference(tmp_path / "a", net(2), InferenceConfig(expect_digest="0" * 64))


def test_the_newest_step_of_a_root(tmp_path: Path) -> None:
    with pytest.raises(shardckpt.CheckpointNotFound):
        shardckpt.load_for_inference(tmp_path, net(2))
    with shardckpt.Checkpointer(tmp_path) as ckpt:
        for step in (3, 12):
            ckpt.save(step, {"model": net(step)}, wait=True)
    model = meta_net()
    assert shardckpt.load_for_inference(tmp_path, model).step == 12
    assert same(model, tensors(net(12)))


# ---- names


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.second = nn.Linear(3, 2)


def save_inner(place: Path, **extra: Any) -> str:
    torch.manual_seed(1)
    trained = nn.ModuleDict({"backbone": Inner(), "value": nn.Linear(2, 1)})
    shardckpt.save(place, {"model": trained, **extra})
    return str(place)


def drop_or_cut(name: str) -> str | None:
    return None if name.startswith("value.") else name.removeprefix("backbone.")


@pytest.mark.parametrize(
    "rename", [drop_or_cut, {"backbone.": "", "value.": None}, {"": "no.", "backbone.": "", "value.": None}]
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_names_are_mapped(tmp_path: Path, rename: Any, device: str) -> None:
    url = save_inner(tmp_path / "c")
    with torch.device(device):
        model = Inner()
    restored = shardckpt.load_for_inference(url, model, InferenceConfig(rename=rename))
    trained = shardckpt.load(url).state["model"]
    assert same(model, {name: trained[f"backbone.{name}"] for name in tensors(Inner())})
    assert restored.info.unexpected == ()


def test_a_name_that_is_mapped_away_is_missing_under_its_old_one(tmp_path: Path) -> None:
    url = save_inner(tmp_path / "c")
    model = nn.ModuleDict({"backbone": Inner(), "value": nn.Linear(2, 1)})
    config = InferenceConfig(rename={"value.": None})
    with pytest.raises(shardckpt.MissingNames) as raised:
        shardckpt.load_for_inference(url, model, config)
    assert raised.value.missing == ["model/value.bias", "model/value.weight"]


def test_two_names_that_become_one_are_refused(tmp_path: Path) -> None:
    url = save_inner(tmp_path / "c")
    with pytest.raises(shardckpt.DuplicateName, match=r"makes 'x' of 'model/backbone.first.bias' and of"):
        shardckpt.load_for_inference(url, Inner(), InferenceConfig(rename=lambda name: "x"))


def test_a_mapping_to_something_else_is_refused(tmp_path: Path) -> None:
    url = save_inner(tmp_path / "c")
    with pytest.raises(shardckpt.ConfigError, match=r"made 3 of 'backbone.first.bias'"):
        shardckpt.load_for_inference(url, Inner(), InferenceConfig(rename=lambda name: 3))  # type: ignore[arg-type,return-value]


# ---- what does not fit


def test_missing_and_unexpected_names_are_told(tmp_path: Path) -> None:
    url = save_inner(tmp_path / "c")
    model = nn.ModuleDict({"backbone": Inner(), "other": nn.Linear(2, 2)})
    before = tensors(model)
    with pytest.raises(shardckpt.MissingNames) as raised:
        shardckpt.load_for_inference(url, model)
    missing, unexpected = ["model/other.bias", "model/other.weight"], ["model/value.bias", "model/value.weight"]
    assert (raised.value.missing, raised.value.unexpected) == (missing, unexpected)
    assert same(model, before)
    info = shardckpt.load_for_inference(url, model, InferenceConfig(strict=False, dtype=torch.bfloat16)).info
    assert (list(info.missing), list(info.unexpected)) == (missing, unexpected)
    trained = shardckpt.load(url).state["model"]
    expected = {name: trained.get(name, before[name]).to(torch.bfloat16) for name in before}
    assert same(model, expected)


def test_what_is_missing_on_the_meta_device_has_no_values(tmp_path: Path) -> None:
    url = save_inner(tmp_path / "c")
    with torch.device("meta"):
        model = nn.ModuleDict({"backbone": Inner(), "other": nn.Linear(2, 2)})
    with pytest.raises(shardckpt.MissingNames, match="without values in the model") as raised:
        shardckpt.load_for_inference(url, model, InferenceConfig(strict=False))
    assert raised.value.missing == ["model/other.weight", "model/other.bias"]
    assert all(param.is_meta for param in model.parameters())


def test_one_of_two_tied_names_is_enough(tmp_path: Path) -> None:
    stored = tensors(net(1))
    del stored["head.weight"]
    shardckpt.save(tmp_path / "c", {"model": stored})
    model = meta_net()
    shardckpt.load_for_inference(tmp_path / "c", model)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.head.weight, stored["embed.weight"])


def test_other_shapes_and_kinds_of_dtype_are_refused(tmp_path: Path) -> None:
    shardckpt.save(tmp_path / "c", {"model": {"weight": torch.ones(2, 3), "bias": torch.ones(2, dtype=torch.int64)}})
    with pytest.raises(shardckpt.ShapeMismatch, match="weight"):
        shardckpt.load_for_inference(tmp_path / "c", nn.Linear(4, 2), InferenceConfig(rename={"bias": None}, strict=False))
    with pytest.raises(shardckpt.DtypeMismatch, match="only floating point is converted"):
        shardckpt.load_for_inference(tmp_path / "c", nn.Linear(3, 2))


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.angles: torch.Tensor
        self.register_buffer("angles", torch.tensor([0.1, 0.2, 0.3]), persistent=False)

    def get_extra_state(self) -> dict[str, Any]:
        return {"scheme": "plain", "seen": 3}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.extra = state


def test_buffers_that_are_not_stored_keep_values_and_dtype_and_extra_state_is_handed_over(tmp_path: Path) -> None:
    shardckpt.save(tmp_path / "c", {"model": Rotary()})
    model = Rotary()
    shardckpt.load_for_inference(tmp_path / "c", model, InferenceConfig(dtype=torch.bfloat16, device="cpu"))
    assert (model.scale.dtype, model.angles.dtype) == (torch.bfloat16, torch.float32)
    assert model.angles.tolist() == Rotary().angles.tolist()
    assert model.extra == {"scheme": "plain", "seen": 3}


def test_buffers_on_the_meta_device_that_are_not_stored_are_refused(tmp_path: Path) -> None:
    shardckpt.save(tmp_path / "c", {"model": nn.ModuleDict({"rope": Rotary()})})
    with torch.device("meta"):
        model = nn.ModuleDict({"rope": Rotary()})
    with pytest.raises(shardckpt.StateError, match=r"'rope.angles'.*persistent=False"):
        shardckpt.load_for_inference(tmp_path / "c", model)
    model["rope"].angles = Rotary().angles
    shardckpt.load_for_inference(tmp_path / "c", model)
    assert torch.equal(model["rope"].scale, torch.ones(2))  # type: ignore[arg-type]


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"dtype": "bfloat16"}, "dtype='bfloat16' is no floating-point dtype"),
        ({"dtype": torch.int8}, "dtype=torch.int8 is no floating-point dtype"),
        ({"device": "gpu"}, "device='gpu' is no device of torch"),
        ({"device": "meta"}, "device='meta' holds no values"),
        ({"mesh": 4}, "mesh=4 is no DeviceMesh of one dimension"),
        ({"plan": {}}, "mesh and plan go together"),
        ({"rename": "model."}, "rename='model.' is neither a function"),
        ({"rename": {"a": 1}}, "rename={'a': 1} is neither a function"),
        ({"strict": 1}, "strict=1 is not True or False"),
        ({"key": ""}, "key='' is no name in a state"),
        ({"key": None}, "key=None is no name in a state"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(shardckpt.ConfigError, match=why):
        InferenceConfig(**arguments)


def test_a_config_and_a_model_of_other_types_are_refused(saved: tuple[str, Tensors]) -> None:
    with pytest.raises(shardckpt.ConfigError, match=r"is no shardckpt.InferenceConfig"):
        shardckpt.load_for_inference(saved[0], net(2), {"dtype": torch.float16})  # type: ignore[arg-type]
    with pytest.raises(shardckpt.ConfigError, match=r"is no torch.nn.Module"):
        shardckpt.load_for_inference(saved[0], {})  # type: ignore[arg-type]
