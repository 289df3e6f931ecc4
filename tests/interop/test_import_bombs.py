# SPDX-License-Identifier: Apache-2.0
"""Pickles that are small and cost much: each is refused for what it would take, before it does."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shardckpt.errors import CheckpointError, UnsupportedForeignCheckpoint, UnsupportedPickle
from shardckpt.interop.deepspeed import load
from shardckpt.interop.deepspeed.archive import Archive, Record
from shardckpt.interop.deepspeed.classes import Storage, TensorRef
from shardckpt.interop.deepspeed.pickles import Machine, read_objects
from shardckpt.interop.deepspeed.unfold import DEEPEST, require_tree
from shardckpt.store import open_store
from tests.interop.test_import_layouts import check, write_model, write_partitions

MERSENNE = (1 << 61) - 1
"""Integers that differ by a multiple of it have one hash."""
STORAGE = Storage(Record("a.pt", 0, 1 << 20), "float32")


def run(data: bytes) -> Any:
    return Machine(data, "a.pt", lambda identity: STORAGE).run()


def name(text: str) -> bytes:
    module, _, leaf = text.rpartition(".")
    return f"c{module}\n{leaf}\n".encode()


def number(value: int) -> bytes:
    data = value.to_bytes(16, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def refuse(data: bytes, match: str) -> None:
    with pytest.raises(UnsupportedPickle, match=match):
        run(data)


# ---- keys of one hash


def test_integers_that_can_share_a_hash_are_no_keys() -> None:
    assert hash(5) == hash(5 + MERSENNE) == hash(5 + 9 * MERSENNE)
    assert run(b"}(" + number((1 << 60) - 1) + b"N" + number(1 - (1 << 60)) + b"Nu.") == {
        (1 << 60) - 1: None,
        1 - (1 << 60): None,
    }
    for key in (number(1 << 60), number(-(1 << 60)), number(5 + MERSENNE), number(5 + MERSENNE) + b"\x85"):
        for data in (b"}(" + key + b"Nu.", b"}" + key + b"Ns.", b"\x8f(" + key + b"\x90.", b"(" + key + b"\x91."):
            refuse(data, "more than 60 bits")
        pairs = b"](" + key + b"N\x86e\x85R."
        for function in ("collections.OrderedDict", "collections.Counter"):
            refuse(name(function) + pairs, "more than 60 bits")
        refuse(name("builtins.set") + b"](" + key + b"e\x85R.", "more than 60 bits")


def test_keys_that_are_tuples_are_few() -> None:
    assert hash((-1, -2)) == hash((-2, -1))
    keys = [
        b"(" + b"".join(b"J" + struct.pack("<i", part) for part in key) + b"tN"
        for key in itertools.product((-1, -2), repeat=13)
    ]
    assert len(run(b"}(" + b"".join(keys[:4096]) + b"u.")) == 4096
    refuse(b"}(" + b"".join(keys[:4097]) + b"u.", "4096 keys that are tuples")
    # in all dicts and sets of the pickle together
    refuse(b"(" + b"".join(b"}" + key + b"s" for key in keys[:4097]) + b"t.", "4096 keys that are tuples")


# ---- calls that copy


COPIES: dict[str, bytes] = {
    "an ordered dict": name("collections.OrderedDict") + b"q\x01",
    "a counter": name("collections.Counter") + b"q\x01",
    "a set": name("builtins.set") + b"q\x01",
    "bytes": name("_codecs.encode") + b"q\x01",
    "an object": name("deepspeed.runtime.fp16.loss_scaler.LossScaler") + b"q\x01",
}


@pytest.mark.parametrize("function", COPIES.values(), ids=COPIES)
def test_a_value_is_not_copied_over_and_over(function: bytes) -> None:
    listed = b"](" + b"".join(text(f"{at:02x}") + b"\x8c\x01x\x86" for at in range(256)) + b"e"
    value = {"a set": b"](" + b"".join(text(f"{at:02x}") for at in range(256)) + b"e", "bytes": text("x" * 2000)}
    kind = next(kind for kind, code in COPIES.items() if code is function)
    begin = value.get(kind, listed) + b"q\x000" + function + b"0("
    once = b"h\x01h\x00\x85R"
    assert len(run(begin + once + b"l.")) == 1
    refuse(begin + once * 1000 + b"l.", "more than stands in it")
    # the arguments as a whole are one value too
    refuse(begin + b"h\x00\x85q\x020" + b"h\x01h\x02R" * 1000 + b"l.", "more than stands in it")


def test_attributes_are_not_copied_over_and_over() -> None:
    scaler = name("deepspeed.runtime.fp16.loss_scaler.LossScaler") + b")\x81"
    attributes = b"}(" + b"".join(text(f"{at:02x}") + b"N" for at in range(256)) + b"uq\x000"
    assert len(run(attributes + scaler + b"h\x00b.").state) == 256
    refuse(attributes + scaler + b"h\x00b" * 1000 + b".", "more than stands in it")


def test_what_makes_no_tensors_makes_none_by_a_way_round() -> None:
    again = name("torch._tensor._rebuild_from_type_v2") + b"q\x01"
    for function in ("_codecs.encode", "collections.OrderedDict", "torch._tensor._rebuild_from_type_v2", "torch.Size"):
        refuse(again + b"(" + name(function) + name("torch.Tensor") + b")NtR.", "makes no tensors")


@pytest.mark.parametrize("dims", [b")", b"](" + b"K\x01" * 65 + b"e", b"(" + b"K\x01" * 65 + b"t", b"K\x01"], ids=range(4))
def test_sizes_without_end_are_refused(dims: bytes) -> None:
    made = name("torch._utils._rebuild_tensor_v2") + b"(NQK\x00" + dims + dims + b"\x89NtR."
    if dims == b")":
        assert run(made).shape == ()
    else:
        refuse(made, "65 sizes|has no len")
        refuse(name("torch.Size") + dims + b"\x85R.", "too many|has no len")


# ---- values that share parts


def bomb(levels: int, pair: bytes = b"h\x00\x86") -> bytes:
    """A tuple of two, of two, ...: 2 ** levels parts in a few bytes each."""
    return b"N" + (b"q\x00" + pair) * levels


BOMBS: dict[str, bytes] = {
    "tuples": bomb(40),
    "lists": b"N" + b"q\x000](h\x00h\x00e" * 40,
    "dicts": b"N" + b"q\x000}(K\x00h\x00K\x01h\x00u" * 40,
    "objects": b"N" + (b"q\x000" + name("deepspeed.runtime.fp16.loss_scaler.LossScaler") + b"h\x00h\x00\x86R") * 40,
    "deep": b"N" + b"\x85" * (DEEPEST + 1),
    "a list that holds itself": b"]q\x00h\x00a",
    "a dict that holds itself by way of a list": b"}q\x00K\x00](h\x00es",
    "an object that holds itself": name("deepspeed.runtime.fp16.loss_scaler.LossScaler")
    + b")\x81q\x00}X\x01\x00\x00\x00xh\x00sb",
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_what_is_no_tree_is_refused(data: bytes) -> None:
    refuse(data + b".", "holds itself|nested deeper")


def test_parts_may_be_shared() -> None:
    assert run(bomb(10) + b".") == run(bomb(10) + b".")
    shared = {"betas": (0.9, 0.999)}
    require_tree([shared] * 1000, 3001 + 1000)
    with pytest.raises(ValueError, match="more than 2999 parts"):
        require_tree([shared] * 1000, 2999)


# ---- whole files and directories


class Counting(Archive):
    """Counts how often a storage is looked up."""

    looked = 0

    def storage(self, key: str) -> Record:
        self.looked += 1
        return super().storage(key)


def test_a_storage_is_looked_up_once(tmp_path: Path) -> None:
    base = torch.arange(10.0)
    torch.save([base[at:] for at in range(10)] + [torch.ones(1)], tmp_path / "a.pt")
    archive = Counting(open_store(tmp_path), "a.pt")
    found = read_objects(archive)
    assert [ref.offset for ref in found if isinstance(ref, TensorRef)] == [*range(10), 0]
    assert archive.looked == 2
    archive.close()


def pairs(levels: int) -> Any:
    value: Any = ()
    for _ in range(levels):
        value = (value, value)
    return value


def cycle() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


MODELS: dict[str, Callable[[], dict[str, Any]]] = {
    "a bomb for the walk": lambda: {"lr_scheduler": {"x": pairs(40)}},
    "a bomb for a hash": lambda: {"shared_params": {"a": pairs(40)}},
    "a bomb for a message": lambda: {"ds_version": pairs(40)},
    "a cycle": lambda: {"lr_scheduler": {"x": cycle()}},
    "a cycle in what the user saved": lambda: {"client": cycle()},
    "sizes whose product has no end": lambda: {"param_shapes": [{"a": [1 << 8000] * 100_000}]},
    "sizes of what is frozen": lambda: {"frozen_param_shapes": {"z": [1 << 8000] * 100_000}},
    "a step that is no number of steps": lambda: {"global_steps": 1 << 70},
    "no number of ranks": lambda: {"dp_world_size": float("inf"), "mp_world_size": float("inf")},
    "scattered elements, many times": lambda: {"client": [torch.zeros(4096, 2)[:, :1]] * 100},
}


@pytest.mark.parametrize("more", MODELS.values(), ids=MODELS)
def test_a_directory_that_is_a_bomb_is_refused(tmp_path: Path, more: Callable[[], dict[str, Any]]) -> None:
    write_model(tmp_path / "tag", **more())
    write_partitions(tmp_path / "tag")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "tag")
    assert not isinstance(caught.value, UnsupportedForeignCheckpoint) or "param_shapes" not in str(caught.value)


def test_groups_may_name_anything(tmp_path: Path) -> None:
    """Numbers of parameters are looked up, and never become keys."""
    write_model(tmp_path / "tag")
    write_partitions(tmp_path / "tag", params=[0, *(at * MERSENNE for at in range(1, 20_000)), (1, [2])])
    check(load(tmp_path / "tag").state)
