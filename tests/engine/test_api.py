# SPDX-License-Identifier: Apache-2.0
"""`save` and `load` in one process: what comes back is what was saved, in place, or an error that says why not."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt
from shardckpt.errors import (
    AlreadyCommitted,
    CheckpointNotFound,
    ConfigError,
    DigestRefused,
    DtypeMismatch,
    MissingNames,
    ShapeMismatch,
    TargetMismatch,
)
from shardckpt.layout import ITEMSIZE
from tests.engine.simulate import random_tensor, same_bits

SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (3, 5), (2, 0, 3)]


def check_equal(loaded: Any, saved: Any, path: str = "") -> None:
    """The same types, values and bits, all through."""
    assert type(loaded) is type(saved), path
    if isinstance(saved, torch.Tensor):
        assert same_bits(loaded, saved), path
    elif isinstance(saved, dict):
        assert list(loaded) == list(saved) or set(loaded) == set(saved), path
        for key in saved:
            check_equal(loaded[key], saved[key], f"{path}/{key}")
    elif isinstance(saved, list | tuple):
        assert len(loaded) == len(saved), path
        for at, (one, other) in enumerate(zip(loaded, saved, strict=True)):
            check_equal(one, other, f"{path}/{at}")
    elif isinstance(saved, float) and math.isnan(saved):
        assert math.isnan(loaded), path
    else:
        assert loaded == saved, path


def rich_state() -> dict[str, Any]:
    """Tensors of every dtype and odd shapes, containers of all kinds, and values."""
    dtypes = {
        name: [random_tensor(name, shape, at) for at, shape in enumerate(SHAPES)] for name in ITEMSIZE if hasattr(torch, name)
    }
    base = torch.randn(6, 8)
    return {
        "dtypes": dtypes,
        "views": {"t": base.t(), "step": base[::2, 1::3], "expanded": base[:1].expand(4, 8), "flip": base.conj()},
        "mixed": [base, {"a": (1, base[0])}, "text", None, [1, [2.5, [True]]]],
        "by number": {0: base[0], 1: {"exp_avg": base[1], "step": 3}, -7: 1},
        "values": {
            "int": 2**70,
            "small": -1,
            "float": 0.1,
            "nan": float("nan"),
            "inf": -math.inf,
            "bytes": b"\x00\xff",
            "none": None,
            "tuple": (1, (2,), ()),
            "empty": {},
            "counter": Counter("aab"),
            "dtype": torch.bfloat16,
            "size": torch.Size([2, 3]),
            "pairs": {(1, "a"): [1], None: 2.0, True: "x"},
        },
        "keys with / ~ * . @ and ü 漢": {"a/b": base[2], "~1": 1, "__metadata__": torch.ones(1), "$": "dollar"},
        "rng": shardckpt.RNGState(),
    }


def expected_without_target(state: dict[str, Any]) -> dict[str, Any]:
    found = dict(state)
    del found["rng"]
    return found


def test_a_whole_state_comes_back(tmp_path: Path) -> None:
    state = rich_state()
    saved = shardckpt.save(tmp_path / "c", state, step=12, metadata={"git": "abc", "n": [1, (2,)]})
    restored = shardckpt.load(saved.url)
    loaded = dict(restored.state)
    assert set(loaded.pop("rng")) >= {"python", "cpu"}
    check_equal(loaded, expected_without_target(state))
    assert restored.step == saved.step == 12
    assert restored.digest == saved.digest
    assert restored.info.metadata == {"git": "abc", "n": [1, (2,)]}
    assert restored.info.world_size == 1
    assert restored.info.verified
    assert not restored.info.read_once
    assert (restored.info.missing, restored.info.unexpected, restored.info.kept) == ((), (), ())


def emptied(value: Any) -> Any:
    """A state of the same form with anything in it."""
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype)
    if isinstance(value, dict):
        return {key: emptied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(emptied, value))
    return None if not isinstance(value, shardckpt.RNGState) else value


def test_a_target_is_filled_in_place(tmp_path: Path) -> None:
    state = rich_state()
    state["values"] = {"int": 5, "list": [1, 2]}
    drawn = torch.get_rng_state()
    shardckpt.save(tmp_path / "c", state)
    target = emptied(state)
    target["values"] = {"int": 0, "list": []}
    torch.rand(5)
    before = {id(tensor): tensor.data_ptr() for tensor in [*target["dtypes"]["int8"], target["views"]["t"]]}
    restored = shardckpt.load(tmp_path / "c", into=target)
    assert {id(tensor): tensor.data_ptr() for tensor in [*target["dtypes"]["int8"], target["views"]["t"]]} == before
    check_equal({k: v for k, v in target.items() if k != "rng"}, expected_without_target(state))
    check_equal({k: v for k, v in restored.state.items() if k != "rng"}, expected_without_target(state))
    assert torch.equal(torch.get_rng_state(), drawn)


def test_what_a_save_says(tmp_path: Path) -> None:
    state = {"a": torch.zeros(1000), "b": torch.zeros(7, dtype=torch.int8), "v": 1}
    saved = shardckpt.save(tmp_path / "c", state)
    manifest = (tmp_path / "c" / "manifest.json").read_bytes()
    assert saved.url == str(tmp_path / "c")
    assert saved.bytes == 4007
    assert saved.digest == hashlib.sha256(manifest).hexdigest()
    assert saved.step == 0
    assert 0 < saved.seconds < 60
    assert json.loads(manifest)["objects"] == {"v": 1}


def test_what_a_load_says(tmp_path: Path) -> None:
    state = {"a": torch.zeros(1_000_000), "b": torch.zeros(7, dtype=torch.int8)}
    shardckpt.save(tmp_path / "c", state)
    info = shardckpt.load(tmp_path / "c").info
    assert info.bytes_needed == 4_000_007
    assert info.bytes_read == 4_000_007
    part = shardckpt.load(tmp_path / "c", keys=["b"]).info
    assert part.bytes_needed == 7
    assert part.bytes_read <= 65536 + 7
    assert part.seconds > 0


def test_memory_urls() -> None:
    shardckpt.save("memory://api/one", {"x": torch.arange(3)}, step=4)
    restored = shardckpt.load("memory://api/one")
    assert (restored.step, restored.state["x"].tolist()) == (4, [0, 1, 2])
    with shardckpt.Checkpointer("memory://api/run") as ckpt:
        saved = ckpt.save(3, {"x": 1}).result()
        assert ckpt.steps() == [3]
    assert shardckpt.load("memory://api/run").state == {"x": 1}
    assert shardckpt.load(saved.url).digest == saved.digest


def test_a_digest_can_be_asked_for(tmp_path: Path) -> None:
    saved = shardckpt.save(tmp_path / "c", {"x": 1})
    assert shardckpt.load(tmp_path / "c", expect_digest=saved.digest).state == {"x": 1}
    with pytest.raises(DigestRefused, match="not the expected ffff"):
        shardckpt.load(tmp_path / "c", expect_digest="f" * 64)


def test_roots_and_steps_can_be_loaded(tmp_path: Path) -> None:
    with shardckpt.Checkpointer(tmp_path) as ckpt:
        for step in (5, 30, 7):
            ckpt.save(step, {"step": step})
    assert shardckpt.load(tmp_path).state == {"step": 30}
    assert shardckpt.load(f"file://{tmp_path}").step == 30
    assert shardckpt.load(tmp_path / "step-00000007").state == {"step": 7}


def test_nothing_there(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointNotFound, match="there is no committed checkpoint in"):
            shardckpt.load(place)


def test_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    shardckpt.save(tmp_path / "c", {"x": 1})
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    with pytest.raises(AlreadyCommitted, match="Nothing was changed"):
        shardckpt.save(tmp_path / "c", {"x": 2})
    assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == before


@pytest.mark.parametrize("step", [-1, 10**18, 1.0, "1", True, None])
def test_steps_are_numbers(tmp_path: Path, step: Any) -> None:
    with pytest.raises(ConfigError, match="is not an int from 0 to"):
        shardckpt.save(tmp_path / "c", {}, step=step)
    assert not (tmp_path / "c").exists()


def test_an_empty_state(tmp_path: Path) -> None:
    shardckpt.save(tmp_path / "c", {"nothing": {}})
    assert shardckpt.load(tmp_path / "c").state == {}
    assert shardckpt.load(tmp_path / "c", into={"nothing": {}}).state == {"nothing": {}}
    wants: list[dict[str, Any]] = [{"by number": {0: 1}}, {"nothing": {"x": 1}}, {"deep": {"er": {}}}]
    for wanted in wants:
        with pytest.raises(MissingNames):
            shardckpt.load(tmp_path / "c", into=wanted)


# ---- parts, other dtypes, other shapes


@pytest.fixture
def three(tmp_path: Path) -> Path:
    shardckpt.save(tmp_path / "c", {"a": {"x": torch.ones(3), "y": torch.ones(2)}, "b": torch.ones(4), "n": 1})
    return tmp_path / "c"


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["a/*"], {"a": {"x", "y"}}),
        (["*/x", "n"], {"a": {"x"}, "n": None}),
        (["[ab]"], {"b": None}),
        (["a/?"], {"a": {"x", "y"}}),
        ([], {}),
    ],
)
def test_keys_choose_names(three: Path, keys: list[str], names: dict[str, Any]) -> None:
    loaded = shardckpt.load(three, keys=keys).state
    assert {key: set(value) if isinstance(value, dict) else None for key, value in loaded.items()} == names
    target = {"a": {"x": torch.zeros(3), "y": torch.zeros(2)}, "b": torch.zeros(4), "n": 0}
    shardckpt.load(three, into=target, keys=keys)
    filled = {name for name in ("a/x", "a/y", "b") if _at(target, name).sum()} | ({"n"} if target["n"] else set())
    assert filled == {f"{key}/{leaf}" for key, leaves in names.items() for leaf in leaves or ()} | {
        key for key, leaves in names.items() if leaves is None
    }


@pytest.mark.parametrize("keys", ["model/*", b"a", [1], iter(["a"]), 3])
def test_keys_are_a_list_of_patterns(three: Path, keys: Any) -> None:
    with pytest.raises(ConfigError, match=r"is not a list of patterns; write keys=\['model/\*'\]"):
        shardckpt.load(three, keys=keys)


def _at(tree: Any, name: str) -> Any:
    for key in name.split("/"):
        tree = tree[key]
    return tree


def test_only_what_is_below_the_keys_of_the_target_is_looked_at(three: Path) -> None:
    target = {"b": torch.zeros(4)}
    assert shardckpt.load(three, into=target).info.bytes_needed == 16
    assert target["b"].tolist() == [1.0] * 4


def test_names_have_to_agree_when_strict(three: Path) -> None:
    target: dict[str, Any] = {"a": {"x": torch.zeros(3), "z": torch.full((2,), 7.0)}, "b": torch.zeros(4), "m": 5}
    with pytest.raises(
        MissingNames, match=r"missing in the checkpoint: 'a/z', 'm'; .*not in the target: 'a/y'.*strict=False"
    ) as caught:
        shardckpt.load(three, into=target)
    assert caught.value.missing == ["a/z", "m"]
    assert caught.value.unexpected == ["a/y"]
    assert target["b"].sum() == 0, "nothing is filled before the names are checked"
    restored = shardckpt.load(three, into=target, strict=False)
    assert restored.info.missing == ("a/z", "m")
    assert restored.info.unexpected == ("a/y",)
    assert target["b"].tolist() == [1.0] * 4
    assert target["a"]["z"].tolist() == [7.0, 7.0]
    assert target["m"] == 5


def test_long_lists_of_names_are_cut(three: Path) -> None:
    with pytest.raises(MissingNames, match=r"'a/z14', 'a/z15', \.\.\. 30 in all"):
        shardckpt.load(three, into={"a": {f"z{at}": torch.zeros(1) for at in range(30)}}, keys=["a/*"])


def test_shapes_have_to_agree(three: Path) -> None:
    target = {"b": torch.zeros(2, 2)}
    with pytest.raises(
        ShapeMismatch, match=r"'b' has shape \[4\] in the checkpoint and \[2, 2\] in the target.*keys="
    ) as caught:
        shardckpt.load(three, into=target)
    assert (caught.value.name, caught.value.stored, caught.value.target) == ("b", [4], [2, 2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32])
def test_dtypes_are_converted_when_asked(three: Path, dtype: torch.dtype) -> None:
    target = {"b": torch.zeros(4, dtype=dtype)}
    with pytest.raises(DtypeMismatch, match=r"'b' is float32 in the checkpoint and .* in the target.*convert_dtype=True"):
        shardckpt.load(three, into=target)
    assert target["b"].sum() == 0
    shardckpt.load(three, into=target, convert_dtype=True)
    assert torch.equal(target["b"], torch.ones(4, dtype=dtype))


def test_kinds_have_to_agree(three: Path) -> None:
    with pytest.raises(TargetMismatch, match="'b': the checkpoint has a tensor there, but the target a int"):
        shardckpt.load(three, into={"b": 3})
    with pytest.raises(TargetMismatch, match="'n': the checkpoint has a value there, but the target a tensor"):
        shardckpt.load(three, into={"n": torch.zeros(1)})


def test_one_stored_tensor_may_be_wanted_twice(tmp_path: Path) -> None:
    """Tied when saved, no longer tied when loaded."""
    tied = torch.randn(5)
    shardckpt.save(tmp_path / "c", {"a": tied, "b": tied})
    assert shardckpt.load(tmp_path / "c").info.bytes_needed == 20
    target = {"a": torch.zeros(5), "b": torch.zeros(5)}
    shardckpt.load(tmp_path / "c", into=target)
    assert torch.equal(target["a"], tied)
    assert torch.equal(target["b"], tied)


def test_a_pattern_that_matches_nothing_is_an_error_unless_strict_is_off(three: Path) -> None:
    with pytest.raises(MissingNames, match=r"keys=\['modle/\*'\]: no name in the checkpoint matches.*strict=False"):
        shardckpt.load(three, keys=["modle/*"])
    assert shardckpt.load(three, keys=["modle/*"], strict=False).state == {}


@pytest.mark.parametrize("metadata", [3, "a", {1: 2}])
def test_metadata_is_a_mapping_with_str_keys(tmp_path: Path, metadata: Any) -> None:
    with pytest.raises(ConfigError, match="is not a mapping with str keys"):
        shardckpt.save(tmp_path / "c", {"x": 1}, metadata=metadata)
    assert not (tmp_path / "c").exists()
