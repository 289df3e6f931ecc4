# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C while a state goes through little memory, many times and at any point: the call ends, and so does the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROUNDS = 1000
PATIENCE = 240.0

# A timer of the system sends real signals, as another process would: at any point of what the main thread does. Where Python
# itself swallows what its handler raises (in a callback of the garbage collector), staging goes on to its end.
FEED = """
import gc, random, signal, sys, threading
from shardckpt.buffer import Buffer
from shardckpt.feed import Feed

CHUNKS = 3000

def write(feed, ended):
    try:
        feed.begin(lambda memory: bytes(8), 1)
        for index in range(CHUNKS):
            with feed.take(index):
                pass
    except BaseException as error:
        ended.append(error)

def play(numbers):
    feed, ended = Feed(Buffer(2 * 64), CHUNKS * 64, 64), []
    writer = threading.Thread(target=write, args=(feed, ended), daemon=True)
    writer.start()
    is_interrupted = False
    try:
        signal.setitimer(signal.ITIMER_REAL, numbers.uniform(1e-5, 2e-3))
        for index in range(CHUNKS):
            feed.room(index)
            feed.filled(index, bytes(8))
        feed.staged({}, {})
    except KeyboardInterrupt as error:
        is_interrupted = True
        feed.fail(error)
    writer.join(60)
    if writer.is_alive() or len(ended) != is_interrupted:
        sys.exit("the writer waits")
    return is_interrupted

gc.disable()
signal.signal(signal.SIGALRM, signal.default_int_handler)
numbers, rounds = random.Random(3), int(sys.argv[1])
print(sum(play(numbers) for _ in range(rounds)))
"""

SAVES = """
import os, signal, sys
import torch
import shardckpt
from tests.engine.stores import CHUNK, FaultyFileSystem, checkpointer

class Interrupting(FaultyFileSystem):
    left = None

    def pwrite(self, fd, buffer, offset):
        if offset and self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = None
                os.kill(os.getpid(), signal.SIGINT)
        return super().pwrite(fd, buffer, offset)

fs, state, interrupted = Interrupting(), {"t": torch.ones(8 * CHUNK, dtype=torch.uint8)}, 0
with checkpointer(sys.argv[2], fs, host_memory_limit=2 * CHUNK, workers=1) as ckpt:
    ckpt.save(0, state).result(60)
    for step in range(1, int(sys.argv[1]) + 1):
        fs.left = step % 5
        try:
            ckpt.save(step, state)
        except KeyboardInterrupt:
            interrupted += 1
    ckpt.save(1000, state).result(60)
    print(interrupted, ckpt.steps())
"""


def run(program: str, *args: str) -> str:
    """What a program prints; fails if it does not end."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, *args], cwd=root, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_who_is_interrupted_while_staging_never_leaves_the_writer_waiting() -> None:
    assert int(run(FEED, str(ROUNDS))) > ROUNDS / 2


@pytest.mark.slow
def test_saves_that_are_interrupted_fail_and_the_next_ones_succeed(tmp_path: Path) -> None:
    assert run(SAVES, "12", str(tmp_path)) == "12 [0, 1000]"
