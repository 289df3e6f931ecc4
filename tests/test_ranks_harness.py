# SPDX-License-Identifier: Apache-2.0
"""The pool of rank processes keeps its word: results by rank, every traceback, no hang, no dead rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from shardckpt.errors import RankTimeout
from tests.ranks import RankDied, RankErrors, RankPool, RanksHung

ROOT = Path(__file__).parents[1]


def total(factor: int) -> tuple[int, int, float]:
    value = torch.tensor([float(dist.get_rank() * factor)])
    dist.all_reduce(value)
    return dist.get_rank(), dist.get_world_size(), value.item()


def environment() -> tuple[str | None, ...]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    return tuple(os.environ.get(name) for name in names)


def process_id() -> int:
    return os.getpid()


def fail_on(bad: tuple[int, ...]) -> str:
    if dist.get_rank() in bad:
        raise ValueError(f"no luck on rank {dist.get_rank()}")
    return "fine"


def fail_with_details() -> None:
    raise RankTimeout("gone", ranks=[3])


class Unpicklable(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def fail_unpicklable() -> None:
    raise Unpicklable("odd ", "error")


def sleep_on(rank: int, seconds: float) -> None:
    if dist.get_rank() == rank:
        time.sleep(seconds)


def look_for_the_first() -> bool:
    """Whether rank 0, which has nothing to do, has left its group while another rank is still there."""
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        weakref.finalize(dist.distributed_c10d._get_default_group(), store.set, "left", "")
        return False
    time.sleep(0.3)
    return bool(store.check(["left"]))


def gather_what_is_split(other_groups: int) -> list[float]:
    """All of a tensor that is split over a mesh of 2 x 2, made after so many groups that are not the mesh's."""
    for _ in range(other_groups):
        dist.new_group()
    mesh = init_device_mesh("cpu", (2, 2))
    split = cast(DTensor, distribute_tensor(torch.arange(5.0), mesh, [Shard(0), Shard(0)]).detach())
    whole: list[float] = split.full_tensor().tolist()
    return whole


def fail_or_wait() -> None:
    if dist.get_rank() == 0:
        raise ValueError("the others wait for me")
    threading.Event().wait()


def hang_after_an_error() -> None:
    try:
        raise ValueError("why it left")
    finally:
        threading.Event().wait()


def kill_own(rank: int) -> str:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def random_number() -> float:
    return torch.rand(()).item()


def draw_and_spoil() -> float:
    os.environ["SPOILED"] = "1"
    return torch.rand(()).item()


def spoiled() -> bool:
    return "SPOILED" in os.environ


@pytest.mark.parametrize("world_size", [1, 2, 4, 3])
def test_results_come_back_by_rank(ranks: RankPool, world_size: int) -> None:
    expected = sum(range(world_size)) * 10
    assert ranks.run(world_size, total, 10) == [(rank, world_size, expected) for rank in range(world_size)]


def test_environment_is_that_of_torchrun(ranks: RankPool) -> None:
    assert ranks.run(2, environment) == [("0", "0", "2", "2", "127.0.0.1"), ("1", "1", "2", "2", "127.0.0.1")]


def test_processes_are_used_again(ranks: RankPool) -> None:
    assert ranks.run(2, process_id) == ranks.run(2, process_id)


def test_fresh_processes_are_used_once(ranks: RankPool) -> None:
    pooled = ranks.run(1, process_id)
    fresh = ranks.run(1, process_id, fresh=True)
    assert fresh != pooled
    assert ranks.run(1, process_id) == pooled
    assert not Path(f"/proc/{fresh[0]}").exists()


def test_cases_start_alike(ranks: RankPool) -> None:
    first = ranks.run(1, draw_and_spoil)
    assert ranks.run(1, random_number) == first
    assert ranks.run(1, spoiled) == [False]


def test_every_failing_rank_is_reported_with_its_traceback(ranks: RankPool) -> None:
    with pytest.raises(RankErrors) as caught:
        ranks.run(4, fail_on, (1, 3))
    message = str(caught.value)
    assert "2 of 4 ranks failed in fail_on" in message
    assert "no luck on rank 1" in message
    assert "no luck on rank 3" in message
    assert 'raise ValueError(f"no luck on rank {dist.get_rank()}")' in message
    assert caught.value.outcomes[0] == "fine"


def test_expected_errors_are_returned_by_rank(ranks: RankPool) -> None:
    outcomes = ranks.run_expecting_errors(3, fail_on, (0, 2))
    assert [type(outcome) for outcome in outcomes] == [ValueError, str, ValueError]
    assert "in fail_on" in str(outcomes[0].__cause__)


def test_errors_keep_type_and_details(ranks: RankPool) -> None:
    (error,) = ranks.run_expecting_errors(1, fail_with_details)
    assert type(error) is RankTimeout
    assert error.ranks == [3]


def test_error_that_cannot_travel_still_tells_what_it_was(ranks: RankPool) -> None:
    (error,) = ranks.run_expecting_errors(1, fail_unpicklable)
    assert "Unpicklable: odd error" in str(error)


def test_ranks_stay_until_the_last_is_done(ranks: RankPool) -> None:
    """What a rank has sent and another one has not received yet may get lost when it leaves."""
    assert ranks.run(2, look_for_the_first) == [False, False]


def test_hang_shows_all_stacks_and_costs_only_the_case(ranks: RankPool) -> None:
    before = ranks.run(2, process_id)
    with pytest.raises(RanksHung) as caught:
        ranks.run(2, sleep_on, 1, 60.0, timeout=1.0)
    message = str(caught.value)
    assert "still running: ranks [1]" in message
    assert "in sleep_on" in message
    assert "--- rank 0" in message
    after = ranks.run(2, process_id)
    assert not set(after) & set(before)


def test_hang_shows_the_error_of_a_rank_that_is_done(ranks: RankPool) -> None:
    ranks.run(2, process_id)
    with pytest.raises(
        RanksHung, match=r"(?s)running: ranks \[1\].*rank 0: ValueError.*the others wait for me.*in fail_or_wait"
    ):
        ranks.run(2, fail_or_wait, timeout=1.0)


def test_hang_after_an_error_shows_the_error(ranks: RankPool) -> None:
    # it has imported this module, and gets to the error in time
    ranks.run(1, process_id)
    with pytest.raises(RanksHung, match="ValueError: why it left"):
        ranks.run(1, hang_after_an_error, timeout=1.0)


def test_dead_rank_is_told_and_replaced(ranks: RankPool) -> None:
    outcomes = ranks.run_expecting_errors(3, kill_own, 1)
    assert outcomes[0] == outcomes[2] == "alive"
    assert isinstance(outcomes[1], RankDied)
    assert outcomes[1].exitcode == -signal.SIGKILL
    assert [result[2] for result in ranks.run(3, total, 1)] == [3, 3, 3]


def test_dead_rank_0_is_replaced(ranks: RankPool) -> None:
    assert isinstance(ranks.run_expecting_errors(2, kill_own, 0)[0], RankDied)
    assert [result[2] for result in ranks.run(2, total, 1)] == [1, 1]


def test_a_mesh_is_not_taken_for_an_equal_one_of_an_earlier_case(ranks: RankPool) -> None:
    """torch's plans for DTensors name the groups of the mesh that they were made for, and serve all equal meshes."""
    for other_groups in (0, 2, 1):
        assert ranks.run(4, gather_what_is_split, other_groups) == [[0.0, 1.0, 2.0, 3.0, 4.0]] * 4


def test_processes_keep_their_ranks(ranks: RankPool) -> None:
    before = ranks.run(4, process_id)
    ranks.run_expecting_errors(3, kill_own, 1)
    after = ranks.run(4, process_id)
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, True, True]


@pytest.mark.parametrize("world_size", [0, 9])
def test_world_size_has_bounds(ranks: RankPool, world_size: int) -> None:
    with pytest.raises(ValueError, match="1 to 8"):
        ranks.run(world_size, process_id)


@pytest.mark.slow
def test_no_process_survives_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, signal
            from tests.ranks import RankPool
            from tests.test_ranks_harness import process_id

            if __name__ == "__main__":
                print(*RankPool().run(2, process_id), flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            """
        )
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> Any:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
