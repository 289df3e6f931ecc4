# SPDX-License-Identifier: Apache-2.0
"""A save or load takes a few buffers of memory, never a second copy of what it moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import shardckpt
from shardckpt.options import Options
from tests.ranks import RankPool

MIB = 1 << 20
LIMIT = 64 * MIB
ROWS, COLUMNS = 8192, 9600
LARGE = ROWS * COLUMNS * 4
"""300 MiB."""

CAN_MEASURE = Path("/proc/self/clear_refs").exists()
pytestmark = pytest.mark.skipif(not CAN_MEASURE, reason="needs the high-water mark of /proc/self/status")


def resident(kind: str) -> int:
    """Bytes of this process in memory: ``VmRSS`` now, ``VmHWM`` at most since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(kind)


@contextmanager
def growth(found: list[int]) -> Iterator[None]:
    """Append by how much the block grew the process at most."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    yield
    found.append(resident("VmHWM") - before)


def plain() -> torch.Tensor:
    return torch.ones(ROWS, COLUMNS)


def transposed() -> torch.Tensor:
    return torch.ones(COLUMNS, ROWS).t()


def every_other() -> torch.Tensor:
    return torch.ones(ROWS, 2 * COLUMNS)[:, ::2]


def half_a_model() -> list[torch.Tensor]:
    return [torch.ones(COLUMNS // 8, ROWS).t() if at % 2 else torch.ones(ROWS, COLUMNS // 8) for at in range(8)]


def save_once(root: str, make: Callable[[], Any], workers: int) -> int:
    state = {"small": torch.ones(3), "large": make()}
    options = Options(workers=workers)
    shardckpt.save(f"{root}-before", {"small": torch.ones(3)}, options=options)
    found: list[int] = []
    with growth(found):
        saved = shardckpt.save(root, state, options=options)
    assert saved.bytes == LARGE + 12
    return found[0]


def load_once(root: str, make: Callable[[], Any], workers: int) -> int:
    target = {"small": torch.zeros(3), "large": make()}
    tensors = target["large"] if isinstance(target["large"], list) else [target["large"]]
    for tensor in tensors:
        tensor.zero_()
    options = Options(workers=workers)
    shardckpt.load(root, into={"small": target["small"]}, options=options)
    found: list[int] = []
    with growth(found):
        shardckpt.load(root, into=target, options=options)
    assert all(bool((tensor == 1).all()) for tensor in tensors)
    return found[0]


@pytest.mark.parametrize(
    ("make", "workers"),
    [
        pytest.param(transposed, 3, id="transposed"),
        pytest.param(plain, 3, id="plain", marks=pytest.mark.slow),
        pytest.param(every_other, 4, id="every other", marks=pytest.mark.slow),
        pytest.param(half_a_model, 4, id="several", marks=pytest.mark.slow),
    ],
)
def test_no_second_copy_is_made(ranks: RankPool, tmp_path: Path, make: Callable[[], Any], workers: int) -> None:
    root = str(tmp_path / "c")
    (grown,) = ranks.run(1, save_once, root, make, workers, fresh=True)
    assert grown < LIMIT
    (grown,) = ranks.run(1, load_once, root, make, workers, fresh=True)
    assert grown < LIMIT
