# SPDX-License-Identifier: Apache-2.0
"""What the README says of torch.distributed.checkpoint, and that shardckpt does better with the same accidents."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

import shardckpt
from shardckpt.errors import ChecksumMismatch, InvalidManifest

pytestmark = pytest.mark.filterwarnings("ignore")
SIZE = 4096


def save_by_dcp(saved: dict[str, Any], directory: Path) -> None:
    state_dict_saver.save(saved, checkpoint_id=directory, no_dist=True)


def load_by_dcp(target: dict[str, Any], directory: Path) -> None:
    state_dict_loader.load(target, checkpoint_id=directory, no_dist=True)


def state(value: float) -> dict[str, Any]:
    return {"w": torch.full((SIZE,), value), "v": torch.full((SIZE,), value)}


def flip_a_bit_of_data(path: Path, pattern: bytes) -> None:
    """Flip a bit in the midst of a long run of equal elements."""
    data = bytearray(path.read_bytes())
    at = data.index(pattern * 100) + 50 * len(pattern)
    data[at] ^= 1
    path.write_bytes(data)


def data_file(directory: Path, suffix: str) -> Path:
    (found,) = directory.glob(f"*{suffix}")
    return found


ONE = torch.tensor(1.0).numpy().tobytes()


def test_a_flipped_bit_is_loaded_by_dcp(tmp_path: Path) -> None:
    save_by_dcp(state(1.0), tmp_path)
    flip_a_bit_of_data(data_file(tmp_path, ".distcp"), ONE)
    target = state(0.0)
    load_by_dcp(target, tmp_path)
    assert not all(bool((tensor == 1.0).all()) for tensor in target.values())


def test_a_flipped_bit_is_refused_here(tmp_path: Path) -> None:
    shardckpt.save(tmp_path, state(1.0))
    flip_a_bit_of_data(data_file(tmp_path, ".safetensors"), ONE)
    with pytest.raises(ChecksumMismatch):
        shardckpt.load(tmp_path, into=state(0.0))


def test_the_data_of_another_save_is_loaded_by_dcp(tmp_path: Path) -> None:
    """As when a save over an older one was killed before it wrote its metadata."""
    for value in (1.0, 2.0):
        save_by_dcp(state(value), tmp_path / f"{value:g}")
    shutil.copy(data_file(tmp_path / "2", ".distcp"), data_file(tmp_path / "1", ".distcp"))
    target = state(0.0)
    load_by_dcp(target, tmp_path / "1")
    assert bool((target["w"] == 2.0).all())


def test_the_data_of_another_save_is_refused_here(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        shardckpt.save(tmp_path / f"{value:g}", state(value))
    shutil.copy(data_file(tmp_path / "2", ".safetensors"), data_file(tmp_path / "1", ".safetensors"))
    with pytest.raises(ChecksumMismatch):
        shardckpt.load(tmp_path / "1", into=state(0.0))


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("peer", [True, False], ids=["dcp", "shardckpt"])
def test_code_in_the_metadata(tmp_path: Path, peer: bool) -> None:
    directory, ran = tmp_path / "checkpoint", tmp_path / "ran"
    payload = pickle.dumps(Payload(ran))
    if peer:
        save_by_dcp(state(1.0), directory)
        (directory / ".metadata").write_bytes(payload)
        with pytest.raises(CheckpointException):
            load_by_dcp(state(0.0), directory)
    else:
        shardckpt.save(directory, state(1.0))
        (directory / "manifest.json").write_bytes(payload)
        with pytest.raises(InvalidManifest):
            shardckpt.load(directory, into=state(0.0))
    assert ran.exists() is peer
