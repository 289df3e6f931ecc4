# SPDX-License-Identifier: Apache-2.0
"""Loads in a process whose interpreter tells of all code that it is given: ``python -m tests.hostile.audited PLACE CORPUS``.

Prints a JSON object: what happened in each kind of load, and in code that does what none of them may.
"""

from __future__ import annotations

import collections
import json
import marshal
import pickle
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import shardckpt
from shardckpt.errors import CheckpointError
from shardckpt.manifest import MANIFEST_NAME

WATCHED = (
    *("compile", "exec", "import", "marshal.loads", "marshal.load", "pickle.find_class", "code.__new__", "function.__new__"),
    *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn"),
    *("ctypes.dlopen", "ctypes.dlsym", "ctypes.call_function", "webbrowser.open"),
)


class Audit:
    """Notes what the interpreter tells of while it is asked to. A hook cannot be taken out again, so it is switched off."""

    def __init__(self) -> None:
        self._seen: list[str] | None = None
        sys.addaudithook(self._hear)

    def watch(self, act: Callable[[], object]) -> list[str]:
        """What was told of during a call, sorted."""
        self._seen = []
        act()
        seen, self._seen = self._seen, None
        return sorted(set(seen))

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self._seen is not None and event in WATCHED:
            self._seen.append(event if event in CONTROLLED else f"{event} {args!r}")


CONTROLLED = {"compile", "exec", "import", "marshal.loads", "pickle.find_class"}


class Net(nn.Module):
    """Parameters of which two are one, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.norm(self.embed(tokens)))
        return found


def everything(seed: int) -> dict[str, Any]:
    """A state with a leaf of each kind that one process can have."""
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    model(torch.arange(6)).sum().backward()
    optimizer.step()
    scheduler.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "rng": shardckpt.RNGState(),
        "own": shardckpt.PerRank({"seed": seed, "state": torch.arange(seed)}),
        "list": [torch.ones(seed), {"x": torch.zeros(2, dtype=torch.complex128)}, (1, 2)],
        "numbers": {1: torch.ones(2), None: 2.5, (1, "a"): float("nan")},
        "values": [None, True, -(1 << 70), float("inf"), "text", "\udc80", b"bytes", collections.Counter("aab")],
        "torch": [torch.float16, torch.Size((2, 3)), torch.device("cpu")],
        "wide": torch.randn(seed, 40_000).to(torch.float8_e4m3fn),
    }


def load_hostile(paths: Sequence[Path]) -> None:
    for path in paths:
        with suppress(CheckpointError):
            shardckpt.load(path)


def do_what_no_load_may() -> None:
    pickle.loads(pickle.dumps(Path))
    marshal.loads(marshal.dumps(1))
    eval("1 + 1")
    with suppress(ModuleNotFoundError):
        __import__("there_is_no_such_module")


def main() -> None:
    place, corpus = Path(sys.argv[1]), Path(sys.argv[2])
    for seed in (3, 4):
        shardckpt.save(place / str(seed), everything(seed), metadata={"seed": seed})
    target = everything(4)
    hostile = []
    for number, path in enumerate(sorted(corpus.iterdir())):
        hostile.append(place / f"hostile-{number}")
        hostile[-1].mkdir()
        (hostile[-1] / MANIFEST_NAME).write_bytes(path.read_bytes())
    # what is imported by the first load of its kind is what stands in the source
    shardckpt.load(place / "3")
    shardckpt.load(place / "4", target)
    load_hostile(hostile[:1])
    audit = Audit()
    print(
        json.dumps(
            {
                "whole": audit.watch(lambda: shardckpt.load(place / "4")),
                "in place": audit.watch(lambda: shardckpt.load(place / "4", target)),
                "hostile": audit.watch(partial(load_hostile, hostile)),
                "control": audit.watch(do_what_no_load_may),
            }
        )
    )


def sharded(seed: int) -> dict[str, Any]:
    """On ranks: a model of FSDP2 with its optimizer, and what each rank has for itself."""
    torch.manual_seed(seed)
    model = Net()
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.arange(6)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "rng": shardckpt.RNGState(), "own": shardckpt.PerRank(dist.get_rank())}


def load_sharded(place: str) -> list[str]:
    """On ranks: what is told of during loads of a sharded state, after a first one, directly and through the network."""
    state = sharded(1)
    shardckpt.save(place, state)
    ways = [shardckpt.Options(read_once=way) for way in ("never", "always")]
    for options in ways:
        shardckpt.load(place, state, options=options)
    audit = Audit()
    return [seen for options in ways for seen in audit.watch(partial(shardckpt.load, place, state, options=options))]


if __name__ == "__main__":
    main()
