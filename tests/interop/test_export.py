# SPDX-License-Identifier: Apache-2.0
"""Exports as safetensors and as torch files: what other readers find in them, and what a failed one leaves."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

import shardckpt
from shardckpt.errors import AlreadyExists, ChecksumMismatch, ConfigError, ExportRefused, MissingNames, StoreError
from shardckpt.interop.export.content import ContentReader
from shardckpt.interop.export.deepspeed import export_deepspeed
from shardckpt.interop.export.pickling import pickle_value
from shardckpt.interop.export.safetensors import INDEX, export_safetensors
from shardckpt.interop.export.single import export_torch
from shardckpt.interop.export.state import read_state
from shardckpt.interop.export.torchfile import write_torch_file
from shardckpt.maintain.stored import StoredCheckpoint, open_checkpoint
from shardckpt.store import open_store
from shardckpt.store.outside import new_file
from tests.cli.run import run

MODEL = {
    "wide": torch.arange(3000, dtype=torch.float32).reshape(100, 30) / 7,
    "half": torch.linspace(-3, 3, 33).to(torch.bfloat16),
    "none": torch.empty(0, 5),
    "one": torch.tensor(2.5),
    "count": torch.arange(-4, 5),
    "mask": torch.tensor([True, False, True]),
    "tiny": torch.linspace(-1, 1, 11).to(torch.float8_e4m3fn),
}


def saved(path: Path, state: dict[str, Any]) -> StoredCheckpoint:
    shardckpt.save(path, state, step=7)
    return open_checkpoint(open_store(path))


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert (
        found.contiguous().reshape(-1).view(torch.uint8).tolist() == wanted.contiguous().reshape(-1).view(torch.uint8).tolist()
    )


def test_every_dtype_goes_through_safetensors_bit_for_bit(tmp_path: Path) -> None:
    done = export_safetensors(saved(tmp_path / "ckpt", {"model": MODEL, "other": torch.ones(3)}), str(tmp_path / "hf"))
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == MODEL.keys()
    for name, tensor in MODEL.items():
        assert_same(found[name], tensor)
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["model.safetensors"]
    assert (done.bytes, done.written, done.step, done.left_out) == (sum(t.nbytes for t in MODEL.values()), True, 7, ())


def test_shards_hold_no_more_than_they_may(tmp_path: Path) -> None:
    model = {f"layers.{n}.weight": torch.full((n + 1, 100), float(n)) for n in range(8)}
    stored = saved(tmp_path / "ckpt", {"model": model})
    done = export_safetensors(stored, str(tmp_path / "hf"), max_shard_bytes=2000)
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 36 * 400}
    assert index["weight_map"].keys() == model.keys()
    for shard in done.shards:
        found = load_file(tmp_path / "hf" / shard.file)
        size = sum(tensor.nbytes for tensor in found.values())
        assert size == shard.bytes and (size <= 2000 or len(found) == 1)
        for name, tensor in found.items():
            assert index["weight_map"][name] == shard.file
            assert_same(tensor, model[name])
    names = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert names == [f"model-{n:05d}-of-{len(names):05d}.safetensors" for n in range(1, len(names) + 1)]
    assert len(names) == len(done.shards) > 5


def test_weights_are_converted_and_other_tensors_are_not(tmp_path: Path) -> None:
    export_safetensors(saved(tmp_path / "ckpt", {"model": MODEL}), str(tmp_path / "hf"), dtype="bfloat16")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    for name, tensor in MODEL.items():
        assert_same(found[name], tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor)


def test_numbers_beyond_the_range_of_a_dtype_are_refused(tmp_path: Path) -> None:
    stored = saved(tmp_path / "ckpt", {"model": {"w": torch.tensor([1.0, float("inf"), 1e6])}})
    with pytest.raises(ExportRefused, match="'model/w' has numbers that are beyond the range of float16"):
        export_safetensors(stored, str(tmp_path / "hf"), dtype="float16")
    assert not (tmp_path / "hf").exists()
    export_safetensors(stored, str(tmp_path / "hf"), dtype="bfloat16")
    assert load_file(tmp_path / "hf" / "model.safetensors")["w"][1] == float("inf")


class Tied(nn.Module):
    """Its head has the weights of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_are_stored_once_and_safetensors_ties_them_again(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    done = export_safetensors(saved(tmp_path / "ckpt", {"model": model}), str(tmp_path / "hf"))
    assert done.tied == {"head.weight": "embed.weight"}
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert list(file.keys()) == ["embed.weight"]
        assert file.metadata() == {"format": "pt", "head.weight": "embed.weight"}
    load_model(other, tmp_path / "hf" / "model.safetensors")
    assert_same(other.head.weight.detach(), model.embed.weight.detach())


def test_what_is_no_weight_is_left_out_or_refused(tmp_path: Path) -> None:
    state = {"model": {"w": torch.ones(2), "note": "x", "own": shardckpt.PerRank(torch.ones(1))}, "z": torch.ones(1) * 1j}
    stored = saved(tmp_path / "ckpt", state)
    done = export_safetensors(stored, str(tmp_path / "hf"), dry_run=True)
    assert (done.left_out, done.written, (tmp_path / "hf").exists()) == (("model/note", "model/own"), False, False)
    with pytest.raises(ExportRefused, match="no tensor below 'nothing'"):
        export_safetensors(stored, str(tmp_path / "hf"), key="nothing")
    complex_one = saved(tmp_path / "complex", {"model": {"z": torch.ones(1) * 1j}})
    with pytest.raises(ExportRefused, match="'model/z' is complex64, which safetensors has no code for"):
        export_safetensors(complex_one, str(tmp_path / "hf"))


def test_two_names_that_would_become_one_are_refused(tmp_path: Path) -> None:
    stored = saved(tmp_path / "ckpt", {"model": {"a": {"b": torch.ones(2)}, "a.b": torch.zeros(2)}})
    with pytest.raises(ExportRefused, match=r"would be called 'a\.b', which is taken"):
        export_safetensors(stored, str(tmp_path / "hf"))


STATE: dict[str, Any] = {
    "model": MODEL | {"again": MODEL["wide"]},
    "z": torch.tensor([1 + 2j, -1j]),
    "u": torch.arange(5).to(torch.uint16),
    "lists": (1, [2, torch.arange(3)], {"k": None, 3: torch.ones(1)}),
    "values": [True, -1, 1 << 70, -(1 << 40), 0.1, float("inf"), "ä\u20ac", b"\x00\xff", torch.float16, torch.Size([2, 3])],
    "counted": Counter("abca"),
    "device": torch.device("cpu"),
    "own": shardckpt.PerRank({"t": torch.ones(3), "v": [1]}),
}


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_the_whole_state_without_unpickling_code(tmp_path: Path, mmap: bool) -> None:
    stored = saved(tmp_path / "ckpt", STATE)
    done = export_torch(stored, str(tmp_path / "out.pt"))
    found = torch.load(tmp_path / "out.pt", weights_only=True, mmap=mmap)
    wanted = shardckpt.load(tmp_path / "ckpt").state
    assert found.keys() == wanted.keys() == STATE.keys()
    for name in STATE["model"]:
        assert_same(found["model"][name], wanted["model"][name])
        assert found["model"][name].stride() == wanted["model"][name].stride()
    assert found["model"]["again"].data_ptr() == found["model"]["wide"].data_ptr()
    for name in ("z", "u"):
        assert_same(found[name], wanted[name])
    assert (found["values"], found["counted"], found["device"]) == (STATE["values"], STATE["counted"], STATE["device"])
    assert type(found["lists"]) is tuple and found["lists"][1][0] == 2 and found["lists"][2]["k"] is None
    assert_same(found["lists"][2][3], torch.ones(1))
    assert found["own"]["v"] == {0: [1]} and found["own"]["t"][0].tolist() == [1.0, 1.0, 1.0]
    assert done.tensors == len(MODEL) + 5 and done.bytes == sum(t.nbytes for t in MODEL.values()) + 16 + 10 + 24 + 4 + 12


def test_the_zip_archive_is_whole_to_other_readers_and_aligned(tmp_path: Path) -> None:
    export_torch(saved(tmp_path / "ckpt", STATE), str(tmp_path / "out.pt"))
    with zipfile.ZipFile(tmp_path / "out.pt") as archive:
        assert archive.testzip() is None
        data = (tmp_path / "out.pt").read_bytes()
        for entry in archive.infolist():
            name, extra = (int.from_bytes(data[entry.header_offset + at :][:2], "little") for at in (26, 28))
            assert (entry.header_offset + 30 + name + extra) % 64 == 0


def test_large_records_have_lengths_of_64_bits(tmp_path: Path) -> None:
    stored = saved(tmp_path / "ckpt", {"model": MODEL})
    with ContentReader(stored, lambda nbytes: None) as reader, new_file(str(tmp_path / "out.pt")) as file:
        write_torch_file(file, pickle_value(read_state(stored, reader)), reader, large=1000)
    for mmap in (False, True):
        found = torch.load(tmp_path / "out.pt", weights_only=True, mmap=mmap)["model"]
        for name, tensor in MODEL.items():
            assert_same(found[name], tensor)
    with zipfile.ZipFile(tmp_path / "out.pt") as archive:
        assert archive.testzip() is None
        assert {entry.file_size >= 1000 for entry in archive.infolist() if entry.extract_version == 45} == {True}


def test_keys_choose_what_is_in_the_file(tmp_path: Path) -> None:
    stored = saved(tmp_path / "ckpt", STATE)
    export_torch(stored, str(tmp_path / "out.pt"), keys=["model/w*", "counted"])
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert (found.keys(), found["model"].keys()) == ({"model", "counted"}, {"wide"})
    with pytest.raises(MissingNames, match="'modle'"):
        export_torch(stored, str(tmp_path / "other.pt"), keys=["modle"])


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_damage_in_the_middle_is_named_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    stored = saved(tmp_path / "ckpt", {"model": {"a": torch.ones(1 << 20), "b": torch.ones(1 << 20)}})
    (file,) = (tmp_path / "ckpt").rglob("rank-*.safetensors")
    with file.open("r+b") as handle:
        handle.seek(-100, 2)
        handle.write(b"\xff" * 8)
    out = tmp_path / "out"
    with pytest.raises(ChecksumMismatch, match="do not match their digest"):
        if kind == "torch":
            export_torch(stored, str(out))
        else:
            export_safetensors(stored, str(out), max_shard_bytes=1 << 22)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_what_is_there_is_replaced_only_when_told(tmp_path: Path) -> None:
    stored = saved(tmp_path / "ckpt", {"model": {"w": torch.ones(3)}})
    directory, file = tmp_path / "hf", tmp_path / "out.pt"
    directory.mkdir()
    (directory / "model.safetensors").write_text("old")
    file.write_text("old")
    with pytest.raises(AlreadyExists, match="is there already"):
        export_safetensors(stored, str(directory))
    with pytest.raises(AlreadyExists, match="is there already"):
        export_torch(stored, str(file))
    assert file.read_text() == (directory / "model.safetensors").read_text() == "old"
    export_safetensors(stored, str(directory), replace=True)
    export_torch(stored, str(file), replace=True)
    assert load_file(directory / "model.safetensors")["w"].tolist() == [1.0, 1.0, 1.0]
    assert torch.load(file, weights_only=True)["model"]["w"].tolist() == [1.0, 1.0, 1.0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "hf", "out.pt"]


@pytest.mark.parametrize("place", ["ckpt", "ckpt/step-00000001", "notes", "hf", "."])
def test_what_no_export_has_written_is_never_replaced(tmp_path: Path, place: str) -> None:
    with shardckpt.Checkpointer(tmp_path / "ckpt") as checkpointer:
        checkpointer.save(1, {"model": {"w": torch.ones(3)}}, wait=True)
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").write_text("old")
    (tmp_path / "hf" / "tokenizer.json").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    stored = open_checkpoint(open_store(tmp_path / "ckpt"))
    with pytest.raises(AlreadyExists, match="is not replaced"):
        export_safetensors(stored, str(tmp_path / place), replace=True)
    with pytest.raises(StoreError):
        export_torch(stored, str(tmp_path / ("ckpt" if place == "notes" else place)), replace=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("place", ["", "s3://bucket/hf", "gs:/bucket/hf", "a\0b"])
def test_what_is_no_local_path_is_refused(tmp_path: Path, place: str) -> None:
    stored = saved(tmp_path / "ckpt", {"model": {"w": torch.ones(3)}})
    for export in (export_safetensors, export_torch, partial(export_deepspeed, stage=1, world_size=1)):
        with pytest.raises(ConfigError, match=r"is a URL|does not name"):
            export(stored, place)


def test_the_commands_print_what_they_write(tmp_path: Path) -> None:
    shardckpt.save(tmp_path / "ckpt", {"model": Tied()})
    plan = run("export", "safetensors", tmp_path / "ckpt", tmp_path / "hf", "--dry-run", "--dtype", "bf16")
    assert plan.status == 0 and "88 B would be written to" in plan.out and "head.weight is stored as embed.weight" in plan.out
    assert not (tmp_path / "hf").exists()
    done = run("export", "torch", tmp_path / "ckpt", tmp_path / "out.pt", "--keys", "model/*", "--json")
    assert json.loads(done.out)["bytes"] == 176 and (tmp_path / "out.pt").exists()
    again = run("export", "torch", tmp_path / "ckpt", tmp_path / "out.pt")
    assert again.status == 1 and "is there already" in again.err
    wrong = run("export", "safetensors", tmp_path / "ckpt", tmp_path / "hf", "--max-shard-size", "5 apples")
    assert wrong.status == 2 and "'5 apples' is not a size" in wrong.err


MEASURED = """
import resource, sys
from shardckpt.interop.export.content import ContentReader
from shardckpt.interop.export.pickling import pickle_value
from shardckpt.interop.export.safetensors import export_safetensors
from shardckpt.interop.export.single import export_torch
from shardckpt.maintain.stored import open_checkpoint
from shardckpt.store import open_store

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

before = peak()
stored = open_checkpoint(open_store(sys.argv[1]))
if sys.argv[3] == "torch":
    export_torch(stored, sys.argv[2])
else:
    export_safetensors(stored, sys.argv[2], dtype="bfloat16", max_shard_bytes=10**8)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path, kind: str) -> None:
    shardckpt.save(tmp_path / "ckpt", {"model": {"one": torch.ones(60 << 20), "many": torch.ones(20 << 20)}})
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "ckpt"), str(tmp_path / "out"), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    assert int(done.stdout) < 200 << 20
