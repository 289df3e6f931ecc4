# SPDX-License-Identifier: Apache-2.0
"""Files that are hostile, cut or foreign are refused by name, and nothing of them is ever called."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shardckpt.errors import (
    CheckpointError,
    InvalidForeignCheckpoint,
    TruncatedFile,
    UnsupportedForeignCheckpoint,
    UnsupportedPickle,
)
from shardckpt.interop.deepspeed.archive import Archive
from shardckpt.interop.deepspeed.classes import TensorRef
from shardckpt.interop.deepspeed.pickles import Machine, read_objects
from shardckpt.store import open_store


class Call:
    """Pickled as the call of anything."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._call = (function, args)

    def __reduce__(self) -> Any:
        return self._call


def no_storage(identity: Any) -> Any:
    raise TypeError("no storages here")


def run(data: bytes) -> Any:
    return Machine(data, "a.pt", no_storage).run()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Call(os.system, "echo bad"), "posix.system"),
        (Call(eval, "1 + 1"), "builtins.eval"),
        (Call(getattr, "", "upper"), "builtins.getattr"),
        (Call(Call, print), f"{__name__}.Call"),
        (Call(bytearray, 1 << 40), "builtins.bytearray"),
        (Call(open, "/etc/passwd"), None),
        (Call(pickle.loads, b"N."), None),
        ({"a": [Call(__import__, "os")]}, "builtins.__import__"),
        (Path("x"), None),
        (torch.nn.Linear, "torch.nn.modules.linear.Linear"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_is_not_listed_is_refused_by_name(value: object, name: str | None, protocol: int) -> None:
    with pytest.raises(UnsupportedPickle) as caught:
        run(pickle.dumps(value, protocol))
    if name is not None:
        asked = caught.value.refused.replace("__builtin__", "builtins")
        assert asked == name


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02",
        b".",
        b"N",
        b"NN.",
        b"(N.",
        b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.",
        b"ctorch\nSize\nK\x01R.",
        b"ctorch\nTensor\n)R.",
        b"N)R.",
        b"j\xff\xff\xff\xff.",
        b"h\x00.",
        b"X\xff\xff\xff\xffab.",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fab.",
        b"\x8b\xff\xff\xff\x7f.",
        b"\x8b\xff\xff\xff\xff.",
        b"}]Ns.",
        b"]NNs.",
        b"}N(u0a.",
        b"i__main__\nx\n.",
        b"Pkey\n.",
        b"\x82\x01.",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"t.",
        b"e.",
        b"\x86.",
        b"Nb.",
    ],
)
def test_what_no_pickler_writes_is_refused(data: bytes) -> None:
    with pytest.raises(UnsupportedPickle):
        run(data)


def test_a_memo_of_a_huge_index_takes_no_room() -> None:
    assert run(b"Nr\xfe\xff\xff\xff.") is None


def test_keys_whose_hash_costs_without_end_are_refused() -> None:
    nested = b"N" + b"q\x00h\x00\x86" * 60
    with pytest.raises(UnsupportedPickle, match="a key"):
        run(b"}" + nested + b"Ns.")


def test_plain_values_are_those_that_python_reads() -> None:
    value = {"a": [1, -2, 1 << 70, 0.5, True, None, "ä", b"\x00\xff", (1,), (1, 2, 3, 4), {2: "x"}], "b": {3, 4}, "c": ()}
    for protocol in (2, 3, 4, 5):
        assert run(pickle.dumps(value, protocol)) == value


def test_a_pickle_that_is_cut_anywhere_is_refused() -> None:
    data = pickle.dumps({"a": [1, 2.5, "text", (1, 2)], "b": {"c": b"bytes"}}, 2)
    for size in range(len(data)):
        with pytest.raises(UnsupportedPickle):
            run(data[:size])


def test_no_byte_of_a_pickle_brings_another_kind_of_error() -> None:
    data = pickle.dumps({"a": [1, 2.5, "text", (1, 2)], "b": {"c": 1 << 80}}, 2)
    pickletools.dis(data, io.StringIO())
    for at in range(len(data)):
        for flip in (0x01, 0x10, 0x80, 0xFF):
            changed = bytearray(data)
            changed[at] ^= flip
            try:
                run(bytes(changed))
            except UnsupportedPickle:
                continue


# ---- archives


def saved(path: Path, value: object, **options: Any) -> Archive:
    torch.save(value, path, **options)
    return Archive(open_store(path.parent), path.name)


def test_tensors_are_described_and_not_read(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.bfloat16).view(2, 3, 4)
    found = read_objects(saved(tmp_path / "a.pt", {"x": base[1, :, 1:3], "p": torch.nn.Parameter(torch.ones(2))}))
    x = found["x"]
    assert isinstance(x, TensorRef)
    assert (x.dtype, x.shape, x.strides, x.offset) == ("bfloat16", (3, 2), (4, 1), 13)
    data = (tmp_path / "a.pt").read_bytes()[x.record.offset : x.record.offset + x.record.nbytes]
    assert data == base.view(torch.int16).numpy().tobytes()
    assert found["p"].shape == (2,)


def test_old_files_are_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedForeignCheckpoint, match=r"torch\.load and save it again"):
        saved(tmp_path / "a.pt", {"x": 1}, _use_new_zipfile_serialization=False)


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(50 << 20))
    with pytest.raises(UnsupportedForeignCheckpoint, match="compressed"):
        Archive(open_store(tmp_path), "a.pt")


@pytest.mark.parametrize("names", [["../data.pkl", "a/x"], ["a/data.pkl", "b/data/0"], ["data.pkl"], ["a/x", "a/x"]])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_records_of_other_shapes_are_refused(tmp_path: Path, names: list[str]) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for name in names:
            archive.writestr(name, b"N.")
    with pytest.raises(InvalidForeignCheckpoint):
        Archive(open_store(tmp_path), "a.pt").pickle()


def test_a_file_that_is_cut_or_changed_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a.pt", {"x": torch.arange(100.0), "y": list(range(50))}).close()
    whole = (tmp_path / "a.pt").read_bytes()
    for size in [*range(0, len(whole), 7), len(whole) - 1]:
        (tmp_path / "a.pt").write_bytes(whole[:size])
        with pytest.raises((TruncatedFile, InvalidForeignCheckpoint, UnsupportedForeignCheckpoint)):
            read_objects(Archive(open_store(tmp_path), "a.pt"))
    for at in range(0, len(whole), 3):
        changed = bytearray(whole)
        changed[at] ^= 0x11
        (tmp_path / "a.pt").write_bytes(changed)
        try:
            read_objects(Archive(open_store(tmp_path), "a.pt"))
        except CheckpointError:
            continue


def test_tensors_beyond_their_storage_are_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.arange(7, dtype=torch.int32)}, tmp_path / "a.pt")
    archive = Archive(open_store(tmp_path), "a.pt")
    data = archive.pickle()
    assert data.count(b"K\x07") == 2
    with pytest.raises(UnsupportedPickle):
        Machine(data.replace(b"K\x07", b"K\x09"), "a.pt", machine_storage(archive)).run()


def machine_storage(archive: Archive) -> Callable[[Any], Any]:
    from shardckpt.interop.deepspeed.classes import Storage, storage_dtype

    return lambda identity: Storage(archive.storage(identity[2]), storage_dtype(identity[1]))
