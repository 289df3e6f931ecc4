# SPDX-License-Identifier: Apache-2.0
"""Bad input: a named error that says what to do, on every rank, and nothing that was saved before is touched."""

from __future__ import annotations

import enum
import errno
import random
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import shardckpt
from shardckpt.errors import (
    AlreadyCommitted,
    CheckpointerClosed,
    CheckpointError,
    ConfigError,
    DuplicateName,
    MissingFile,
    NotACheckpointRoot,
    RankFailed,
    ReplicaDivergence,
    StateError,
    StorageFull,
    StoreError,
    TableMismatch,
    UnsupportedLeaf,
)
from shardckpt.journal import DIRECTORY
from shardckpt.meeting import require_joined
from shardckpt.options import Options
from shardckpt.saving import Saver
from shardckpt.store import LocalStore
from tests.engine.recording import connect
from tests.ranks import RankPool
from tests.store.faults import FaultyFileSystem

GOOD = {"model": {"w": torch.arange(6.0)}, "step": 1}


def contents(root: Path) -> dict[str, bytes]:
    """All files but the markers that tell of failed saves."""
    files = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(f"{DIRECTORY}/")}


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A root with one good step, which has to be there unchanged, and loadable, when the test is over."""
    place = tmp_path / "run"
    with shardckpt.Checkpointer(place) as ckpt:
        ckpt.save(1, GOOD, wait=True)
    before = contents(place)
    yield place
    assert contents(place) == before
    loaded = shardckpt.load(place)
    assert loaded.step == 1
    assert torch.equal(loaded.state["model"]["w"], GOOD["model"]["w"])  # type: ignore[index]


class Color(enum.Enum):
    RED = 1


class Pair(NamedTuple):
    a: int
    b: int


@dataclass
class Config:
    lr: float = 0.1


class Plain:
    pass


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


LEAVES: dict[str, tuple[Any, str]] = {
    "an object": (Plain(), "nothing is pickled. Use tensors or values"),
    "a function": (print, "Store what identifies it, such as its name"),
    "a lambda": (lambda: 0, "Store what identifies it"),
    "a class": (torch.nn.Linear, "Store what identifies it"),
    "a set": ({1, 2}, "Use sorted(x), a list"),
    "a path": (Path("x"), "Use str(x)"),
    "a generator of torch": (torch.Generator(), "Use x.get_state(), a tensor"),
    "a NumPy array": (np.zeros(3), "Use torch.from_numpy(x), or x.tolist()"),
    "a NumPy number": (np.float32(1.0), "Use .item() for a Python number"),
    "a complex number": (1j, "Use torch.tensor(x)"),
    "an enum": (Color.RED, "Store its .value, or its .name"),
    "a named tuple": (Pair(1, 2), "Use x._asdict(), or tuple(x)"),
    "a dataclass": (Config(), "Use dataclasses.asdict(x)"),
    "a bytearray": (bytearray(b"x"), "Use bytes"),
    "a generator of numbers": (random.Random(0), "or give it state_dict() and load_state_dict()"),
    "a lock": (threading.Lock(), "nothing is pickled"),
    "a deque": (deque([1]), "nothing is pickled"),
    "a sparse tensor": (torch.eye(3).to_sparse(), "Store its parts, such as indices() and values()"),
    "a list with one bad item": ([1, 2, {"x": Plain()}], "nothing is pickled"),
    "a value nested too deep": (nested(200), "nested deeper than 64"),
}


@pytest.mark.parametrize(("leaf", "advice"), LEAVES.values(), ids=LEAVES)
def test_leaves_that_are_not_stored(root: Path, leaf: Any, advice: str) -> None:
    state = {"model": {"w": torch.zeros(2)}, "extra": {"here": leaf}}
    with shardckpt.Checkpointer(root) as ckpt, pytest.raises((UnsupportedLeaf, StateError)) as caught:
        ckpt.save(2, state, wait=True)
    assert "extra/here" in str(caught.value)
    assert advice in str(caught.value)


CYCLE: dict[str, Any] = {"w": torch.zeros(1)}
CYCLE["again"] = CYCLE
STATES: dict[str, tuple[Any, type[CheckpointError], str]] = {
    "two keys of one name": ({"x": {1: torch.ones(1), "1": torch.ones(1)}}, DuplicateName, "two keys of one mapping"),
    "a state that is no mapping": ([torch.ones(1)], StateError, "a mapping with str keys, such as {'model': model}"),
    "keys that are no text": ({1: torch.ones(1)}, StateError, "a mapping with str keys"),
    "an empty key": ({"x": {"": torch.ones(1)}}, StateError, "is empty; rename it"),
    "a key of two lines": ({"a\nb": torch.ones(1)}, StateError, "cannot be printed; rename it"),
    "a state that holds itself": ({"c": CYCLE}, StateError, "break the cycle"),
    "no memory yet": ({"w": torch.ones(2, device="meta")}, StateError, "model.to_empty(device=...)"),
    "an optimizer alone": (
        {"o": torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)},
        StateError,
        "Put the module that owns it into the state",
    ),
}


@pytest.mark.parametrize(("state", "kind", "advice"), STATES.values(), ids=STATES)
def test_states_that_cannot_be_saved(root: Path, state: Any, kind: type[CheckpointError], advice: str) -> None:
    with shardckpt.Checkpointer(root) as ckpt, pytest.raises(kind) as caught:
        ckpt.save(2, state, wait=True)
    assert advice in str(caught.value)


def test_metadata_that_is_not_stored(root: Path) -> None:
    with shardckpt.Checkpointer(root) as ckpt:
        with pytest.raises(UnsupportedLeaf, match="'metadata"):
            ckpt.save(2, GOOD, metadata={"f": Plain()}, wait=True)
        with pytest.raises((CheckpointError, TypeError, ValueError)):
            ckpt.save(2, GOOD, metadata=3, wait=True)  # type: ignore[arg-type]


# ---- on ranks: they have to agree


def dtensor(value: float = 1.0, *placements: Any, mesh_size: int | None = None) -> torch.Tensor:
    mesh = init_device_mesh("cpu", (mesh_size or dist.get_world_size(),))
    return distribute_tensor(torch.full((6,), value), mesh, list(placements) or [Shard(0)])


def partial() -> torch.Tensor:
    return DTensor.from_local(torch.ones(3), init_device_mesh("cpu", (dist.get_world_size(),)), [Partial()])


RANK_STATES: dict[str, tuple[Callable[[int], Any], type[CheckpointError], list[str]]] = {
    "other keys at the top": (
        lambda rank: {"model": {}, "extra": 1} if rank else {"model": {}},
        TableMismatch,
        ["different keys", "['extra']", "rank 0", "rank 1", "an empty mapping is fine"],
    ),
    "other values": (
        lambda rank: {"lr": 0.1 * (rank + 1)},
        ReplicaDivergence,
        ["'lr' differs between ranks", "[0, 1, 2]", "PerRank(...)"],
    ),
    "other values inside of a value": (
        lambda rank: {"c": {"sizes": [1, 2, rank]}},
        ReplicaDivergence,
        ["'c/sizes' differs between ranks", "PerRank(...)"],
    ),
    "other tensors": (
        lambda rank: {"w": torch.full((4,), float(rank == 2))},
        ReplicaDivergence,
        ["'w' differs between ranks [0, 1] and ranks [2]", "missing all-reduce", "PerRank(...)"],
    ),
    "other replicas of a DTensor": (
        lambda rank: {"w": dtensor(1.0, Replicate()).mul_(1.0 + (rank == 1))},
        ReplicaDivergence,
        ["'w' differs between ranks [0, 2] and ranks [1]"],
    ),
    "other shapes": (
        lambda rank: {"w": torch.zeros(3 + rank)},
        TableMismatch,
        ["'w' is float32[3] on rank 0 but float32[4] on rank 1", "PerRank(...)"],
    ),
    "other dtypes": (
        lambda rank: {"w": torch.zeros(3, dtype=torch.int8 if rank else torch.int16)},
        TableMismatch,
        ["'w' is int16[3] on rank 0 but int8[3] on rank 1"],
    ),
    "a shard that is missing": (
        lambda rank: {"m": {} if (w := dtensor()) is not None and rank == 1 else {"w": w}},
        TableMismatch,
        ["'m/w' is sharded over ranks [0, 1, 2], but ranks [1] did not list it"],
    ),
    "sharded here and plain there": (
        lambda rank: {"w": [torch.zeros(6), w := dtensor(), w][rank]},
        TableMismatch,
        ["sharded on some ranks and plain on others"],
    ),
    "a value here and a tensor there": (
        lambda rank: {"w": 1 if rank else torch.zeros(1)},
        CheckpointError,
        ["'w'"],
    ),
    "sums that were not reduced": (lambda rank: {"w": partial()}, UnsupportedLeaf, ["placement P(sum)", "redistribute()"]),
    "flat slices with a gap": (
        lambda rank: {"w": shardckpt.Flat(torch.ones(2), (10,), 3 * rank)},
        TableMismatch,
        ["flat ranges leave a gap or overlap at element 2"],
    ),
}


def save_state(root: str, case: str) -> None:
    with shardckpt.Checkpointer(root, options=Options(timeout=30)) as ckpt:
        ckpt.save(2, RANK_STATES[case][0](dist.get_rank()), wait=True)


@pytest.mark.parametrize("case", RANK_STATES)
def test_ranks_that_do_not_agree(ranks: RankPool, root: Path, case: str) -> None:
    _, kind, said = RANK_STATES[case]
    for outcome in ranks.run_expecting_errors(3, save_state, str(root), case):
        assert isinstance(outcome, kind), outcome
        assert not isinstance(outcome, RankFailed), outcome
        assert not [text for text in said if text not in str(outcome)], outcome


def save_other_step(root: str) -> None:
    with shardckpt.Checkpointer(root, options=Options(timeout=30)) as ckpt:
        ckpt.save(2 + dist.get_rank() // 2, {"w": 1}, wait=True)


def test_ranks_that_save_other_steps(ranks: RankPool, root: Path) -> None:
    for outcome in ranks.run_expecting_errors(3, save_other_step, str(root)):
        assert isinstance(outcome, ReplicaDivergence)
        assert "'step' differs between ranks" in str(outcome)


# ---- places


@pytest.mark.parametrize("call", [lambda url: shardckpt.save(url, GOOD), shardckpt.load], ids=["save", "load"])
def test_paths_that_are_files(root: Path, tmp_path: Path, call: Callable[[Any], Any]) -> None:
    (tmp_path / "file").write_text("mine")
    for url in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotACheckpointRoot, match=r"not a directory but a file.*choose another root"):
            call(url)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_step_where_a_file_is(root: Path) -> None:
    blocking = root / "step-00000002"
    blocking.write_text("mine")
    with shardckpt.Checkpointer(root) as ckpt, pytest.raises(NotACheckpointRoot, match="not a directory but a file"):
        ckpt.save(2, GOOD, wait=True)
    assert blocking.read_text() == "mine"
    blocking.unlink()


def test_places_that_are_no_places(root: Path) -> None:
    for url in ("", "ftp://host/x", "s3://", "memory://"):
        with pytest.raises(ConfigError):
            shardckpt.save(url, GOOD)


def test_a_place_where_nothing_can_be_made(root: Path) -> None:
    with pytest.raises(MissingFile, match=r"cannot make directory '/proc/none'.*the path is wrong"):
        shardckpt.save("/proc/none", GOOD)


@pytest.mark.parametrize(
    ("operation", "code", "kind", "advice"),
    [
        ("mkdir", errno.EACCES, StoreError, "this user has no permission: check owner and mode"),
        ("mkdir", errno.EROFS, StoreError, "mounted read-only: remount it or choose another root"),
        ("mkdir", errno.ENOSPC, StorageFull, "free space there, or prune older checkpoints"),
        ("open", errno.EACCES, StoreError, "this user has no permission"),
        ("pwrite", errno.ENOSPC, StorageFull, "free space there, or prune older checkpoints"),
        ("pwrite", errno.EDQUOT, StorageFull, "free quota there"),
        ("link", errno.ENOSPC, StorageFull, "free space there"),
    ],
)
def test_places_that_cannot_be_written(root: Path, operation: str, code: int, kind: type[CheckpointError], advice: str) -> None:
    fs = FaultyFileSystem()
    with connect() as coordinator:
        saver = Saver(coordinator, LocalStore(root, fs), Options())
        fs.fail_always(operation, code)
        with pytest.raises(kind) as caught:
            saver.save("step-00000002/", 2, GOOD, {})
    assert advice in str(caught.value)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_full(small_disk: Path) -> None:
    with shardckpt.Checkpointer(small_disk / "run") as ckpt:
        ckpt.save(1, {"w": torch.ones(1000)}, wait=True)
        for _ in range(2):
            with pytest.raises(StorageFull, match="free space there, or prune older checkpoints"):
                ckpt.save(2, {"w": torch.ones(1_000_000)}, wait=True)
        assert {path.name for path in (small_disk / "run").iterdir()} <= {"step-00000001", DIRECTORY}
        ckpt.save(2, {"w": torch.ones(1001)}, wait=True)
        assert ckpt.steps() == [1, 2]


def test_a_disk_that_is_read_only(small_disk: Path) -> None:
    shardckpt.save(small_disk / "c", GOOD)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(StoreError, match="mounted read-only"):
        shardckpt.save(small_disk / "d", GOOD)
    assert shardckpt.load(small_disk / "c").state["step"] == 1
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)


# ---- arguments of other kinds


MISTAKES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "the state before the place": (lambda root: shardckpt.save(GOOD, root), "a dict is not a place for checkpoints"),  # type: ignore[arg-type]
    "no place": (lambda root: shardckpt.load(None), "a NoneType is not a place"),  # type: ignore[arg-type]
    "a place in bytes": (lambda root: shardckpt.load(bytes(root)), "a bytes is not a place"),  # type: ignore[arg-type]
    "a URL through pathlib": (lambda root: shardckpt.load(Path("s3://bucket/run")), "'s3:/bucket/run' has one slash"),
    "options that are a dict": (
        lambda root: shardckpt.Checkpointer(root, options={"stage": "lazy"}),  # type: ignore[arg-type]
        "write options=shardckpt.Options(stage='lazy')",
    ),
    "options that are their class": (
        lambda root: shardckpt.load(root, options=shardckpt.Options),  # type: ignore[arg-type]
        "is no shardckpt.Options",
    ),
    "options of an engine": (
        lambda root: shardckpt.get_checkpoint_engine("lazy", root, options={}),
        "options={} is no shardckpt.Options",
    ),
    "an engine without a name": (
        lambda root: shardckpt.get_checkpoint_engine(["sync"], root),  # type: ignore[arg-type]
        "['sync'] is not known; there are: async",
    ),
    "a timeout of True": (lambda root: shardckpt.Options(timeout=True), "timeout=True is not a number of seconds"),
    "strict in words": (lambda root: shardckpt.load(root, strict="no"), "strict='no' is not True or False"),  # type: ignore[arg-type]
    "a dtype to convert to": (
        lambda root: shardckpt.load(root, convert_dtype=torch.bfloat16),  # type: ignore[arg-type]
        "convert_dtype=torch.bfloat16 is not True or False",
    ),
    "the digest of the content": (
        lambda root: shardckpt.load(root, expect_digest="0" * 32),
        "64 hex digits. Saved.digest is that, and shardckpt show prints it",
    ),
    "a digest as a number": (lambda root: shardckpt.load(root, expect_digest=7), "expect_digest=7 is not"),  # type: ignore[arg-type]
    "a step in words": (lambda root: with_checkpointer(root, lambda c: c.restore({}, step="1")), "step='1' is not an int"),
    "a step of True": (lambda root: with_checkpointer(root, lambda c: c.restore({}, step=True)), "step=True is not an int"),
    "the state before the step": (
        lambda root: with_checkpointer(root, lambda c: c.save({"w": torch.zeros(99)}, 2)),
        "step=dict(...) is not an int from 0",
    ),
    "signals in a list": (
        lambda root: with_checkpointer(root, lambda c: c.on_signal([signal.SIGTERM])),
        "is not a signal; the signal module has their names",
    ),
    "no state of a sampler": (
        lambda root: shardckpt.ElasticSampler(9, 3).load_state_dict(None),  # type: ignore[arg-type]
        "not a state of an ElasticSampler",
    ),
}


def with_checkpointer(root: Path, call: Callable[[Any], Any]) -> None:
    with shardckpt.Checkpointer(root) as ckpt:
        call(ckpt)


@pytest.mark.parametrize(("call", "said"), MISTAKES.values(), ids=MISTAKES)
def test_arguments_of_other_kinds(root: Path, call: Callable[[Path], Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call(root)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_processes_that_were_not_joined() -> None:
    for environ in ({}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "many"}):
        require_joined(environ)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=4 says .* call torch\.distributed\.init_process_group\(\) before"):
        require_joined({"WORLD_SIZE": "4"})


# ---- order of calls


def test_saves_after_close_and_steps_that_are_there(root: Path) -> None:
    with shardckpt.Checkpointer(root) as ckpt, pytest.raises(AlreadyCommitted, match="save another step, or remove that one"):
        ckpt.save(1, {"other": 1}, wait=True)
    with pytest.raises(CheckpointerClosed, match="make a new one"):
        ckpt.save(2, GOOD, wait=True)


def load_alone(url: str) -> list[float]:
    state = {"w": torch.zeros(6)}
    shardckpt.load(url, into=state)
    return state["w"].tolist()


def save_sharded(url: str) -> None:
    shardckpt.save(url, {"w": dtensor(3.0)})


def test_one_process_loads_what_several_have_saved(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(4, save_sharded, str(tmp_path / "c"))
    assert ranks.run(1, load_alone, str(tmp_path / "c")) == [[3.0] * 6]
    assert load_alone(str(tmp_path / "c")) == [3.0] * 6
