# SPDX-License-Identifier: Apache-2.0
"""Where checkpoints go: real file systems that are full, small, read-only or in memory, and others that are not there."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt
from shardckpt.cli.doctor import report
from shardckpt.doctor import Diagnosis, Finding, Machine
from shardckpt.doctor.finding import amount
from shardckpt.doctor.newest import Newest
from shardckpt.doctor.storage import check_root, check_storage, judge_memory, judge_mount, judge_space
from shardckpt.errors import StoreError
from shardckpt.store import Entry, MemoryStore, Store
from shardckpt.store.filesystem import FileSystem
from shardckpt.store.mounts import Mount
from shardckpt.store.trial import Space, Speed, Trial
from tests.cli.run import run
from tests.store.test_trial import Sized

MIB = 1 << 20
GB = 10**9
FINE = Trial(direct=True, links=True, flush_seconds=0.002, speed=Speed(256 * MIB, 2e9, 3e9))
DISK = Mount("/", "/dev/sda", "ext4", ("rw", "relatime"))
ROOMY = Sized(blocks=1 << 30, free=1 << 29, files=0, free_files=0)
NEWEST = Newest(step=7, world_size=8, nbytes=10 * GB, files=9, staged=8 * GB)


def machine(root: Path | str | None, trial: Trial = FINE, mount: Mount | None = DISK, **parts: Any) -> Machine:
    """A machine with this root, whose storage is not really tried."""
    parts = {"available_memory": lambda: 64 * GB, "ranks_per_node": None, "fs": ROOMY, **parts}
    return Machine(
        root=None if root is None else str(root), mount_of=lambda path: mount, try_store=lambda store, most, fs: trial, **parts
    )


def look(subject: Machine) -> dict[str, Finding]:
    return {finding.check: finding for finding in check_storage(subject)}


def saved(root: Path, nbytes: int = MIB) -> Path:
    with shardckpt.Checkpointer(root) as ckpt:
        ckpt.save(3, {"own": torch.zeros(nbytes, dtype=torch.uint8)}, wait=True)
    return root


# ---- what is there


def test_a_place_without_checkpoints(tmp_path: Path) -> None:
    root = tmp_path / "a" / "run"
    found = look(machine(root))
    assert {finding.status for finding in found.values()} == {"ok"}
    assert list(found) == ["storage", "free space", "o_direct", "hard links", "flush", "write speed", "read speed"]
    assert found["storage"].text.startswith(f"{root} is not there yet; {tmp_path}: ext4 on /dev/sda")
    assert found["flush"].text == "2 ms until a write is durable"
    assert found["write speed"].text == "2 GB/s by one process, with 268 MB"
    assert list(tmp_path.iterdir()) == []


def test_the_newest_checkpoint_is_what_has_to_fit(tmp_path: Path) -> None:
    root = saved(tmp_path / "run")
    files = list((root / "step-00000003").iterdir())
    nbytes = sum(path.stat().st_size for path in files)
    found = look(machine(root))
    assert found["newest checkpoint"].text == f"step 3: {amount(nbytes)} by 1 rank"
    assert found["newest checkpoint"].values == {"step": 3, "world_size": 1, "bytes": nbytes, "files": len(files)}
    assert found["staging memory"].values["ranks"] == 1
    assert found["free space"].values["checkpoints"] == found["free space"].values["free"] // nbytes
    assert "alone it takes" in found["read speed"].text


def test_a_directory_of_other_things(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    found = look(machine(tmp_path))["newest checkpoint"]
    assert found.status == "problem"
    assert found.text == f"{tmp_path} has no checkpoint in it, and holds 'thesis.tex'"
    assert found.remedy == "use a new or an empty directory"


def test_a_directory_with_nothing_in_it_that_counts(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    (tmp_path / ".snapshots").mkdir()
    (tmp_path / ".snapshots" / "1").write_text("mine")
    assert "newest checkpoint" not in look(machine(tmp_path))


def test_a_directory_that_may_not_be_listed(tmp_path: Path) -> None:
    class Closed(Sized):
        def listdir(self, path: str) -> list[str]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    found = look(machine(tmp_path, fs=Closed(blocks=1 << 30, free=1 << 29, files=0, free_files=0)))["newest checkpoint"]
    assert (found.status, found.text) == ("problem", f"cannot list '{tmp_path}': Permission denied (EACCES)")
    assert "check owner and mode" in found.remedy


def test_a_new_file_system_of_another_user(tmp_path: Path) -> None:
    class Fresh(Sized):
        def listdir(self, path: str) -> list[str]:
            if path.endswith("lost+found"):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return super().listdir(path)

    (tmp_path / "lost+found").mkdir()
    found = look(machine(tmp_path, fs=Fresh(blocks=1 << 30, free=1 << 29, files=0, free_files=0)))["newest checkpoint"]
    assert found.status == "problem"
    assert found.remedy == f"choose a directory below, such as {tmp_path}/run"


class Counted(Sized):
    """Knows how many directories were listed."""

    listed = 0

    def listdir(self, path: str) -> list[str]:
        self.listed += 1
        return super().listdir(path)


def test_a_whole_disk_is_not_searched(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number:02}").mkdir()
        (tmp_path / f"{number:02}" / "file").write_text("mine")
    fs = Counted(blocks=1 << 30, free=1 << 29, files=0, free_files=0)
    found = look(machine(tmp_path, fs=fs))["newest checkpoint"]
    assert "holds '00/file'" in found.text
    assert fs.listed == 3


@pytest.mark.parametrize(
    ("root", "said"),
    [("file", "is not a directory but a file"), ("file/run", "is not a directory"), ("\0", "does not name a directory")],
)
def test_what_is_no_place_for_checkpoints(tmp_path: Path, root: str, said: str) -> None:
    (tmp_path / "file").write_text("mine")
    found = look(machine(tmp_path / root))
    assert list(found) == ["storage"]
    assert found["storage"].status == "problem"
    assert said in found["storage"].text + found["storage"].remedy


def test_the_memory_of_a_process() -> None:
    found = look(machine("memory://doctor"))
    assert found["storage"].status == "warning"
    assert found["storage"].text == "memory://doctor, in the memory of a process: gone when that ends"
    assert "free space" not in found
    assert found["write speed"].status == "ok"


def test_a_store_that_does_not_answer_is_not_tried() -> None:
    class Silent(MemoryStore):
        def list(self, prefix: str = "") -> Sequence[Entry]:
            raise StoreError("cannot list: operation timed out; try again", transient=True)

    found = {finding.check: finding for finding in check_root(machine(None), Silent("doctor"))}
    assert list(found) == ["storage", "newest checkpoint"]
    assert (found["newest checkpoint"].status, found["newest checkpoint"].remedy) == ("problem", "try again")


def test_slow_object_stores_are_no_disks() -> None:
    slow = dataclasses.replace(FINE, speed=Speed(16 * MIB, 0.05e9, 2e9))
    found = look(machine("memory://doctor", slow))["write speed"]
    assert found.status == "warning"
    assert "network to the service" in found.remedy


@pytest.mark.parametrize(
    ("root", "kind", "blocks", "available", "free", "tried"),
    [
        (None, "tmpfs", 1 << 30, 100 * MIB, 100 * MIB, 25 * MIB),
        (None, "tmpfs", 1 << 30, None, 4096 << 29, 256 * MIB),
        (None, "ramfs", 0, 100 * MIB, 100 * MIB, 25 * MIB),
        (None, "ext4", 1 << 30, 100 * MIB, 4096 << 29, 256 * MIB),
        ("memory://doctor", "ext4", 1 << 30, 100 * MIB, None, 25 * MIB),
    ],
)
def test_what_lies_in_memory_has_no_more_room_than_that(
    tmp_path: Path, root: str | None, kind: str, blocks: int, available: int | None, free: int | None, tried: int
) -> None:
    most = []

    def try_store(store: Store, nbytes: int, fs: FileSystem) -> Trial:
        most.append(nbytes)
        return FINE

    fs = Sized(blocks=blocks, free=1 << 29, files=0, free_files=0)
    subject = machine(root or tmp_path, mount=Mount("/", "none", kind, ("rw",)), fs=fs, available_memory=lambda: available)
    found = look(dataclasses.replace(subject, try_store=try_store))
    assert most == [tried]
    assert (found["free space"].values["free"] if "free space" in found else None) == free


# ---- verdicts


@pytest.mark.parametrize(
    ("kind", "options", "status", "said"),
    [
        ("ext4", ("rw",), "ok", "cannot use if they do not share it"),
        ("nfs4", ("rw", "hard"), "ok", "a file system of several hosts"),
        ("lustre", ("rw",), "ok", "a file system of several hosts"),
        ("nfs4", ("rw", "soft"), "warning", "mounted with soft: writes fail for good"),
        ("ext4", ("rw", "barrier=0"), "warning", "mounted with barrier=0: a flush does not reach the device"),
        ("overlay", ("rw", "volatile"), "warning", "mounted with volatile: flushes do nothing"),
        ("overlay", ("rw", "fsync=volatile"), "warning", "mounted with fsync=volatile: flushes do nothing"),
        ("overlay", ("rw",), "warning", "gone when that is removed"),
        ("tmpfs", ("rw",), "warning", "gone when the machine restarts"),
        ("proc", ("rw",), "problem", "which holds no files"),
    ],
)
def test_file_systems(kind: str, options: tuple[str, ...], status: str, said: str) -> None:
    found = judge_mount("/ckpts", "/ckpts", Mount("/ckpts", "disk", kind, options))
    assert found.status == status
    assert said in found.text
    assert bool(found.remedy) is (status != "ok")


def test_a_file_system_that_is_not_told_of_is_no_fault() -> None:
    assert judge_mount("/ckpts", "/ckpts", None).status == "ok"


@pytest.mark.parametrize(
    ("free", "free_files", "newest", "status", "said"),
    [
        (100 * GB, None, NEWEST, "ok", "100 GB of 1 TB: room for 10 more checkpoints"),
        (20 * GB, 25, NEWEST, "ok", "room for 2 more checkpoints"),
        (20 * GB - 1, None, NEWEST, "warning", "room for one more checkpoint, and not for two"),
        (10 * GB, None, NEWEST, "warning", "room for one more checkpoint, and not for two"),
        (10 * GB - 1, None, NEWEST, "problem", "one more checkpoint of 10 GB does not fit"),
        (100 * GB, 24, NEWEST, "problem", "only 24 more files, and a save makes up to 25"),
        (100 * GB, 3, None, "problem", "only 3 more files"),
        (100 * GB, None, None, "ok", "100 GB of 1 TB"),
        (GB, None, None, "warning", "1 GB of 1 TB"),
        (64 * MIB, None, None, "warning", "67.1 MB of 1 TB"),
        (64 * MIB - 1, None, None, "problem", "67.1 MB of 1 TB: no checkpoint of a model fits"),
        (0, 0, None, "problem", "0 B of 1 TB"),
    ],
)
def test_room(free: int, free_files: int | None, newest: Newest | None, status: str, said: str) -> None:
    [found] = judge_space(Space(1000 * GB, free, free_files), newest)
    assert (found.status, said in found.text) == (status, True)
    assert bool(found.remedy) is (status != "ok")


@pytest.mark.parametrize(
    ("available", "ranks_per_node", "world_size", "needed", "status"),
    [
        (9 * GB, None, None, 8 * GB, "ok"),
        (8 * GB, None, None, 8 * GB, "warning"),
        (2 * GB, 1, None, 1 * GB, "ok"),
        (1 * GB, 1, None, 1 * GB, "warning"),
        (5 * GB, 8, 16, 4 * GB, "ok"),
        (5 * GB, 16, None, 8 * GB, "warning"),
    ],
)
def test_memory_for_what_the_ranks_of_a_node_stage(
    available: int, ranks_per_node: int | None, world_size: int | None, needed: int, status: str
) -> None:
    """Nine tenths of what is available are taken at most."""
    node = machine(None, available_memory=lambda: available, ranks_per_node=ranks_per_node, world_size=world_size)
    [found] = judge_memory(node, NEWEST)
    assert (found.values["needed"], found.values["usable"], found.status) == (needed, int(0.9 * available), status)
    assert ("--nproc-per-node" in found.remedy) is (status == "warning")


def test_memory_of_which_nothing_is_known() -> None:
    assert list(judge_memory(machine(None, available_memory=lambda: None), NEWEST)) == []
    assert list(judge_memory(machine(None), None)) == []


@pytest.mark.parametrize(
    ("trial", "check", "said", "remedy"),
    [
        ({"direct": False}, "o_direct", "through the page cache", "another one"),
        ({"links": False}, "hard links", "under a claim", ".claim.tmp"),
        ({"flush_seconds": 0.25}, "flush", "250 ms", "smartctl"),
        ({"speed": Speed(16 * MIB, 0.05e9, 2e9)}, "write speed", "0.05 GB/s by one process, with 16.8 MB", "iostat"),
        ({"speed": Speed(16 * MIB, 2e9, 0.05e9)}, "read speed", "0.05 GB/s", "iostat"),
        ({"speed": None}, "write speed", "no room", "free space"),
    ],
)
def test_slow_and_poor_storage_is_warned_of(tmp_path: Path, trial: dict[str, Any], check: str, said: str, remedy: str) -> None:
    found = look(machine(tmp_path, dataclasses.replace(FINE, **trial)))
    assert {name for name, finding in found.items() if finding.status != "ok"} == {check}
    assert found[check].status == "warning"
    assert said in found[check].text
    assert remedy in found[check].remedy


def test_amounts() -> None:
    assert [amount(count) for count in (0, 999, 1000, 999_499, 999_500, 12_345_678, 10**15)] == [
        "0 B",
        "999 B",
        "1 kB",
        "999 kB",
        "1 MB",
        "12.3 MB",
        "1e+03 TB",
    ]


# ---- real file systems


def mount(kind: str, options: str, device: Path | str, place: Path) -> None:
    command = ["mount", "-t", kind, "-o", options, str(device), str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory, of 20 MiB and 40 files."""
    place = tmp_path / "small"
    place.mkdir()
    mount("tmpfs", f"size={20 * MIB},nr_inodes=40", "tmpfs", place)
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def really(root: Path) -> dict[str, Finding]:
    return look(Machine(root=str(root)))


def test_a_file_system_in_memory(small: Path) -> None:
    found = really(saved(small / "run"))
    assert found["storage"].status == "warning"
    assert found["storage"].values["kind"] == "tmpfs"
    assert found["free space"].values["total"] == 20 * MIB
    assert 15 <= found["free space"].values["checkpoints"] <= 18
    assert found["hard links"].status == "ok"
    assert MIB <= found["write speed"].values["bytes"] <= 5 * MIB
    assert found["write speed"].values["bytes_per_second"] > 0
    assert sorted(path.name for path in small.iterdir()) == ["run"]


def test_a_file_system_with_room_for_one_more(small: Path) -> None:
    found = really(saved(small / "run", 7 * MIB))["free space"]
    assert found.status == "warning"
    assert "room for one more checkpoint, and not for two" in found.text


def test_a_full_file_system(small: Path) -> None:
    root = saved(small / "run")
    # rounded down to nothing, so that not even the smallest file can be made
    with (small / "ballast").open("wb", buffering=0) as ballast:
        os.posix_fallocate(ballast.fileno(), 0, shutil.disk_usage(small).free)
    found = really(root)
    assert (found["free space"].status, found["free space"].values["free"]) == ("problem", 0)
    assert found["free space"].remedy.startswith("free space there, or prune older checkpoints")
    assert found["storage writes"].status == "problem"
    assert "No space left on device" in found["storage writes"].text
    assert {path.name for path in small.rglob("probe.*")} == set()


def test_a_file_system_that_can_hold_no_more_files(small: Path) -> None:
    root = saved(small / "run")
    for number in range(20):
        (small / str(number)).touch()
    found = really(root)["free space"]
    assert found.status == "problem"
    assert "more files, and a save makes up to" in found.text
    assert "inodes" in found.remedy


def test_a_read_only_file_system(small: Path) -> None:
    root = saved(small / "run")
    subprocess.run(["mount", "-o", "remount,ro", small], check=True)
    found = really(root)
    assert found["newest checkpoint"].status == "ok"
    assert found["storage writes"].status == "problem"
    assert "Read-only file system (EROFS)" in found["storage writes"].text
    assert found["storage writes"].remedy == "the file system is mounted read-only: remount it or choose another root"


def test_a_layer_of_a_container(tmp_path: Path, small: Path) -> None:
    for name in ("upper", "work", "lower"):
        (small / name).mkdir()
    place = tmp_path / "layer"
    place.mkdir()
    mount("overlay", f"lowerdir={small}/lower,upperdir={small}/upper,workdir={small}/work", "overlay", place)
    try:
        found = really(place)
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
    assert found["storage"].status == "warning"
    assert "a layer of a container" in found["storage"].text
    assert found["write speed"].values["bytes"] >= MIB


def test_files_of_the_kernel_are_no_place() -> None:
    found = really(Path("/proc/self"))
    assert list(found) == ["storage"]
    assert found["storage"].status == "problem"


# ---- the command


def test_the_command_tries_the_root_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    root = saved(tmp_path / "run")
    before = sorted(path.relative_to(root) for path in root.rglob("*"))
    found = run("doctor", root, "--nproc-per-node", "1", "--json").json
    checks = {check["check"]: check for check in found["checks"]}
    assert checks["newest checkpoint"]["values"]["step"] == 3
    assert checks["staging memory"]["values"]["ranks"] == 1
    assert checks["storage"]["values"]["path"] == str(root)
    assert sorted(path.relative_to(root) for path in root.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ftp://host/run"], "is not a place for checkpoints"),
        ([""], "does not name a directory"),
        (["--rdzv-endpoint", "host:port"], "is no rendezvous endpoint"),
        (["--rdzv-endpoint", "host:70000"], "from 1 to 65535"),
        (["--rdzv-endpoint", "evil\x1b[31m:1"], "is no rendezvous endpoint"),
        (["--nproc-per-node", "0"], "nproc-per-node"),
    ],
)
def test_what_was_typed_wrongly_is_wrong_usage(arguments: list[str], said: str) -> None:
    done = run("doctor", *arguments)
    assert done.status == 2
    assert said in done.err
    assert "\x1b[31m" not in done.err


def doctor_process(program: str, **settings: str) -> dict[str, dict[str, Any]]:
    """The checks of a doctor that a program calls, in a process with these settings in its environment."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("AWS_")}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{program}"], env={**kept, **settings}, capture_output=True, text=True, timeout=120
    )
    assert done.stdout, done.stderr
    return {check["check"]: check for check in json.loads(done.stdout)["checks"]}


DOCTOR = "from shardckpt.cli.app import cli_main\ncli_main(['doctor', 's3://bucket/doctor', '--json'])"


@pytest.mark.slow
def test_what_is_not_installed_is_a_problem_of_the_machine() -> None:
    checks = doctor_process(f"sys.modules['obstore'] = None\n{DOCTOR}")
    assert checks["storage"]["status"] == "problem"
    assert checks["storage"]["text"] == "'s3://bucket/doctor' needs the package obstore, which is not installed"
    assert checks["storage"]["remedy"] == "pip install 'shardckpt[cloud]'"
    assert {"versions", "host memory", "rendezvous"} <= set(checks)


@pytest.mark.slow
def test_an_object_store_over_plain_http() -> None:
    pytest.importorskip("obstore", reason="object stores are not tested: obstore is not installed")
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    checks = doctor_process(DOCTOR, AWS_ENDPOINT_URL="http://127.0.0.1:1", **keys)
    assert checks["newest checkpoint"]["remedy"].startswith("plain http is refused: set AWS_ALLOW_HTTP=true")


def test_names_that_are_no_text(tmp_path: Path) -> None:
    done = run("doctor", os.fsdecode(os.fsencode(tmp_path) + b"/\xff"), "--json")
    checks = {check["check"]: check for check in done.json["checks"]}
    assert checks["storage"]["values"]["path"] == f"{tmp_path}/\\xff"


def test_names_that_could_steer_a_terminal_are_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "/ckpts/\x1b[2J\n\u202e"
    finding = judge_mount(evil, "/ckpts", Mount("/", "\x1b]0;gone\x07", "tmpfs", ("rw",)))
    report(Diagnosis((), (finding,)), as_json=False)
    report(Diagnosis((), (finding,)), as_json=True)
    printed = capsys.readouterr().out
    assert not set(printed) & {"\x1b", "\x07", "\u202e"}
    assert json.loads(printed[printed.index("{") :])["checks"][0]["values"]["path"] == evil
