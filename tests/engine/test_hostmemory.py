# SPDX-License-Identifier: Apache-2.0
"""How much host memory staging takes: what the file needs, what the limit allows, what there is."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import shardckpt
from shardckpt.available import available_memory, memory_limit
from shardckpt.errors import ConfigError, HostMemoryError
from shardckpt.hostmemory import HostMemory

MIB = 1 << 20
CHUNK = 4 * MIB


def reader(files: Mapping[str, str]) -> Callable[[str], str]:
    def read(path: str) -> str:
        try:
            return files[path]
        except KeyError:
            raise FileNotFoundError(path) from None

    return read


def available(files: Mapping[str, str]) -> int | None:
    return available_memory(reader(files))


MACHINE = {"/proc/meminfo": "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:    4000 kB\n"}


def group(path: str, limit: str, current: int, file: int = 0, shmem: int = 0) -> dict[str, str]:
    where = f"/sys/fs/cgroup{path}"
    stat = f"anon 1\nfile {file}\nshmem {shmem}\n"
    return {f"{where}/memory.max": f"{limit}\n", f"{where}/memory.current": f"{current}\n", f"{where}/memory.stat": stat}


def test_the_machine_alone() -> None:
    assert available(MACHINE) == 4000 * 1024


def test_a_system_that_does_not_tell() -> None:
    assert available({}) is None
    assert available({"/proc/meminfo": "MemTotal: 9000 kB\n", "/proc/self/cgroup": "0::/a\n"}) is None


def test_the_tightest_group_counts_without_its_page_cache() -> None:
    inside = {"/proc/self/cgroup": "4:memory:/old\n0::/job/step\n"}
    job = group("/job", "1000000", 700_000, file=300_000, shmem=100_000)
    step = group("/job/step", "max", 700_000)
    assert available(MACHINE | inside | job | step) == 500_000
    tight = group("/job/step", "600000", 550_000)
    assert available(MACHINE | inside | job | tight) == 50_000


def test_a_group_beyond_its_limit_has_nothing_left() -> None:
    assert available(MACHINE | {"/proc/self/cgroup": "0::/\n"} | group("", "1000", 2000)) == 0


def old_group(path: str, limit: int, usage: int, inactive: int = 0, active: int = 0) -> dict[str, str]:
    where = f"/sys/fs/cgroup/memory{path}"
    stat = f"cache 9\ninactive_file 1\nactive_file 1\ntotal_inactive_file {inactive}\ntotal_active_file {active}\n"
    return {
        f"{where}/memory.limit_in_bytes": f"{limit}\n",
        f"{where}/memory.usage_in_bytes": f"{usage}\n",
        f"{where}/memory.stat": stat,
    }


UNLIMITED = (1 << 63) - 4096


def test_groups_of_version_1() -> None:
    """Also beside those of version 2, which then have no memory."""
    inside = {"/proc/self/cgroup": "5:cpu,memory:/job/step\n1:name=systemd:/x\n0::/\n"}
    outer = old_group("", UNLIMITED, 8_000_000) | old_group("/job", 1_000_000, 700_000, inactive=200_000, active=100_000)
    assert available(MACHINE | inside | outer | old_group("/job/step", UNLIMITED, 700_000)) == 600_000
    assert available(MACHINE | inside | outer | old_group("/job/step", 500_000, 480_000, active=30_000)) == 50_000
    assert available(MACHINE | inside | old_group("/job/step", 500_000, 600_000)) == 0


def test_a_container_that_sees_only_its_own_group_of_version_1() -> None:
    inside = {"/proc/self/cgroup": "4:memory:/docker/0123\n"}
    assert available(MACHINE | inside | old_group("", 300_000, 100_000, inactive=50_000)) == 250_000


def test_the_tightest_limit() -> None:
    inside = {"/proc/self/cgroup": "0::/job/step\n"}
    assert memory_limit(reader(inside | group("/job", "1000000", 7) | group("/job/step", "max", 7))) == 1_000_000
    assert memory_limit(reader({"/proc/self/cgroup": "4:memory:/\n"} | old_group("", UNLIMITED, 7))) is None
    assert memory_limit(reader({"/proc/self/cgroup": "no line of a kernel\n"})) is None


def test_this_machine_has_some() -> None:
    found = available_memory()
    assert found is None or 0 < found < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ---- what is taken


@pytest.mark.parametrize("shared", [False, True])
def test_memory_is_used_again_and_grows(shared: bool) -> None:
    memory = HostMemory(shared=shared, available=lambda: None)
    first = memory.reserve(CHUNK + 1, CHUNK)
    assert first.size == 2 * CHUNK
    assert memory.reserve(1, CHUNK) is first
    assert memory.reserve(0, CHUNK) is first
    assert memory.reserve(5 * CHUNK, CHUNK).size == 5 * CHUNK
    memory.close()
    assert memory.fd is None


def test_shared_memory_is_that_of_its_descriptor() -> None:
    memory = HostMemory(shared=True, available=lambda: None)
    memory.reserve(CHUNK, CHUNK).bytes[:5] = b"hello"
    assert memory.fd is not None
    assert os.pread(memory.fd, 5, 0) == b"hello"
    memory.close()


def test_a_limit_makes_a_ring() -> None:
    memory = HostMemory(limit=3 * CHUNK + 7, available=lambda: 1)
    assert memory.reserve(100 * CHUNK, CHUNK).size == 3 * CHUNK


def test_a_limit_below_one_chunk_is_refused() -> None:
    with pytest.raises(ConfigError, match=rf"leaves this rank {CHUNK - 1} bytes .* at least {CHUNK} bytes for each rank"):
        HostMemory(limit=CHUNK - 1).reserve(CHUNK, CHUNK)


def test_no_more_is_taken_than_there_is_for_each_rank_of_the_node(caplog: pytest.LogCaptureFixture) -> None:
    memory = HostMemory(sharers=2, available=lambda: 20 * CHUNK)
    with caplog.at_level(logging.WARNING, "shardckpt"):
        assert memory.reserve(100 * CHUNK, CHUNK).size == 9 * CHUNK
    assert f"no {100 * CHUNK} bytes of host memory to stage a state in" in caplog.text


def test_memory_that_there_is_again_is_taken() -> None:
    there = [2 * CHUNK]
    memory = HostMemory(available=lambda: there[0])
    small = memory.reserve(10 * CHUNK, CHUNK)
    assert small.size == CHUNK
    assert memory.reserve(10 * CHUNK, CHUNK) is not small
    there[0] = 50 * CHUNK
    assert memory.reserve(10 * CHUNK, CHUNK).size == 10 * CHUNK


def test_at_least_one_chunk_is_tried() -> None:
    assert HostMemory(available=lambda: 5).reserve(100 * CHUNK, CHUNK).size == CHUNK


def test_memory_that_the_system_refuses(caplog: pytest.LogCaptureFixture) -> None:
    """More than there are addresses for: what can be had is taken instead."""
    memory = HostMemory(available=lambda: None)
    with caplog.at_level(logging.WARNING, "shardckpt"):
        assert memory.reserve(1 << 60, CHUNK).size == 16 * CHUNK
    assert "bytes of host memory to stage a state in" in caplog.text


def test_shared_memory_that_is_full(caplog: pytest.LogCaptureFixture) -> None:
    """A descriptor that takes no more bytes stands for a full system: everything is refused, and said."""
    memory = HostMemory(shared=True, available=lambda: None)
    assert memory.fd is not None
    readable = os.open(f"/proc/self/fd/{memory.fd}", os.O_RDONLY)
    os.dup2(readable, memory.fd)
    with pytest.raises(HostMemoryError, match=rf"not even {CHUNK} bytes of host memory .* save with wait=True"):
        memory.reserve(9 * CHUNK, CHUNK)
    os.close(readable)
    memory.close()


def test_nothing_is_put_on_a_mount_of_shared_memory(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    with shardckpt.Checkpointer(tmp_path, options=shardckpt.Options(background="process")) as ckpt:
        handle = ckpt.save(1, {"x": 1})
        assert set(os.listdir("/dev/shm")) <= before
        handle.result()
