# SPDX-License-Identifier: Apache-2.0
"""Start a save in the background: agree on it, stage the state as the options say, and let a carrier finish it."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from shardckpt.device_staging import DeviceStaging
from shardckpt.errors import CheckpointError, StateChanged
from shardckpt.failure import describe, rebuild
from shardckpt.feed import Feed, Samples, Source, failed_feed
from shardckpt.gpu import GPU, gpu_of, near, wants_pinning
from shardckpt.guard import STEP_GUARD, Versions, owned_by_optimizers
from shardckpt.handle import SaveHandle
from shardckpt.live import LiveSource
from shardckpt.options import Options
from shardckpt.progress import Outcome, Progress
from shardckpt.readback import Verify
from shardckpt.saving import Prepared, Saved, Saver
from shardckpt.stage import FileData, wait_for_devices
from shardckpt.staging import LazyStaging, host_batches, stage_at_once, stage_through_ring
from shardckpt.store import Store

from .carrier import Carrier

logger = logging.getLogger("shardckpt")


class UnderWay:
    """A save as whoever paces saves sees it: over when the next one would not have to wait, so when it has its parity too."""

    def __init__(self, handle: SaveHandle, background: Background) -> None:
        self._handle = handle
        self._background = background

    @property
    def stall(self) -> float:
        """Seconds that training was held."""
        return self._handle.stall

    @property
    def error(self) -> CheckpointError | None:
        """Why it failed."""
        return self._handle.error

    def done(self) -> bool:
        """Whether it is over."""
        return self._handle.done() and not self._background.is_busy


class Background:
    """Saves that go on while training does, one at a time."""

    def __init__(
        self,
        saver: Saver,
        store: Store,
        carrier: Carrier,
        options: Options,
        local_ranks: int,
        *,
        lazy_threads: int = 1,
        devices: DeviceStaging,
    ) -> None:
        """``lazy_threads`` copy what is staged lazily; with none, it is copied when a step waits for it, as tests want it."""
        self._saver = saver
        self._store = store
        self._carrier = carrier
        self._options = options
        self._threads = max(1, min(options.workers, len(os.sched_getaffinity(0)) // local_ranks))
        self._lazy_threads = lazy_threads
        self._devices = devices
        self._gpus: dict[torch.device, GPU | None] = {}
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._idle = threading.Event()
        self._idle.set()
        self._feed: Feed | None = None
        self._staging: LazyStaging | None = None

    def start(
        self,
        progress: Progress,
        prefix: str,
        state: Mapping[str, Any],
        metadata: Mapping[str, Any],
        verify: Verify | None = None,
    ) -> None:
        """Start a save when none is under way. Returns when the state may be changed, as far as ``Options.stage`` says.

        Collective. What the call itself gets wrong is raised here; all later errors go to ``progress``.
        """
        notice, timings = self._carrier.notice, progress.timings
        prepared = self._saver.prepare(prefix, progress.handle.step, state, metadata, timings, notice, verify)
        try:
            source = self._make_source(prepared, progress, state)
        except Exception as error:
            # the other ranks are about to write, so they have to hear of it
            source = failed_feed(prepared.data.nbytes, prepared.plan.chunk, error)
        self._feed, self._staging = source if isinstance(source, Feed) else None, None
        task = partial(self._finish, prepared, source, progress)
        if isinstance(source, Feed) and not source.is_ring:
            # first the copy, which training waits for
            try:
                self._stage(prepared, source, state, progress)
            finally:
                # after Ctrl-C too: the other ranks wait for this one
                self._begin(task)
        else:
            self._begin(task)
            if isinstance(source, Feed):
                self._stage(prepared, source, state, progress)

    def drop(self, error: CheckpointError) -> None:
        """Make the save that is under way fail, unless it is staged."""
        feed = self._feed
        if feed is not None:
            feed.fail(error)

    @property
    def is_busy(self) -> bool:
        """Whether a save is under way."""
        return not self._idle.is_set()

    def wait(self) -> None:
        """Return when no save is under way; each has deadlines of its own."""
        self._idle.wait()

    def close(self) -> None:
        """Give back memory and processes, when no save is under way."""
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join()
        self._devices.close()
        self._carrier.close()

    def _begin(self, task: Callable[[], None]) -> None:
        """Carry out ``task`` in the background; in one thread for all saves, as starting one waits until it runs."""
        self._idle.clear()
        self._tasks.put(task)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="shardckpt-save", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception:
                logger.exception("what follows a save failed")
            finally:
                # it refers to the state's plan, and to memory
                del task
                self._idle.set()

    def _make_source(self, prepared: Prepared, progress: Progress, state: Mapping[str, Any]) -> Source:
        data, chunk = prepared.data, prepared.plan.chunk
        if self._options.stage == "none":
            versions = Versions.of(data.tensors, owned_by_optimizers(state).tensors)

            def sample() -> Samples:
                # asked for when all is written
                _require_unchanged(versions, "With stage='none', change nothing before result() of the handle returns")
                return prepared.sample()

            return LiveSource(data, chunk, self._options.workers, sample)
        return self._make_feed(data, chunk, prepared.attempt, progress)

    def _make_feed(self, data: FileData, chunk: int, attempt: str, progress: Progress) -> Feed:
        """A feed whose memory, when there is something on a GPU, lies near it and is page-locked."""
        devices = {tensor.device: None for tensor in data.tensors.values() if self._devices.takes(tensor)}
        for device in devices:
            if device not in self._gpus:
                self._gpus[device] = gpu_of(device)
        with near(next((self._gpus[device] for device in devices), None)):
            feed = self._carrier.feed(data.nbytes, chunk, partial(self._staged, attempt, progress))
            if self._options.pin_memory != "never" and wants_pinning(self._options.pin_memory, devices):
                try:
                    self._carrier.memory.lock(self._options.pin_memory)
                except (CheckpointError, RuntimeError) as error:
                    # so that the other ranks hear of it
                    feed.fail(error)
        return feed

    def _stage(self, prepared: Prepared, feed: Feed, state: Mapping[str, Any], progress: Progress) -> None:
        try:
            data = prepared.data
            # what the copies of `DeviceStaging` need not: they wait for it on the device
            wait_for_devices(t for t in data.tensors.values() if feed.is_ring or not self._devices.takes(t))
            if feed.is_ring:
                stage_through_ring(data, feed, prepared.plan.plan.block_size, prepared.sample, progress.timings)
            elif self._options.stage == "lazy":
                self._stage_lazily(prepared, feed, state, progress)
                return
            else:
                stage_at_once(data, feed, self._devices, self._threads, progress.timings)
                feed.staged(prepared.sample(), progress.timings.seconds)
        except BaseException as error:
            feed.fail(error)
            if not isinstance(error, Exception):
                raise
        prepared.release()

    def _stage_lazily(self, prepared: Prepared, feed: Feed, state: Mapping[str, Any], progress: Progress) -> None:
        data, devices = prepared.data, self._devices
        is_owned = owned_by_optimizers(state)
        owned = {name: data.tensors[name] for name in data.where.names if is_owned(data.tensors[name])}
        stage_at_once(data, feed, devices, self._threads, progress.timings, lambda name: name not in owned)
        # not those on a GPU: to look at them then would wait for all that training has queued there
        late = {name for name, tensor in owned.items() if not devices.takes(tensor)}
        samples = prepared.sample(lambda name: name not in late)
        versions = Versions.of(owned, is_owned.tensors)

        def look() -> None:
            for key, found in prepared.sample(lambda name: name in late).items():
                samples[key].update(found)
            _require_unchanged(versions, "Call wait_staged() of the handle before changing tensors other than by an optimizer")

        def end() -> None:
            try:
                feed.staged(samples, progress.timings.seconds)
            finally:
                STEP_GUARD.forget(staging)
                prepared.release()

        later = host_batches(data, feed.chunk, devices, lambda name: name in owned)
        copies = devices.start(data, feed.memory.tensor, lambda name: name in owned)
        on_wait = progress.handle._add_stall
        self._staging = staging = LazyStaging(data, feed, later, copies, look, end, on_wait, progress.timings)
        STEP_GUARD.watch(staging)

    def _finish(self, prepared: Prepared, source: Source, progress: Progress) -> None:
        outcome: Outcome
        try:
            if self._staging is not None:
                self._staging.start(self._lazy_threads)
            self._note(prepared.attempt, source, progress)
            job = prepared.make_job()
            digest = self._carrier.carry(job, source, prepared.notice, progress.timings)
            outcome = prepared.describe(self._store, digest)
        except BaseException as error:
            if isinstance(source, Feed):
                # somebody may be waiting for room in it
                source.fail(error)
            outcome = error if isinstance(error, CheckpointError) else _as_checkpoint_error(error)
        if self._staging is not None:
            # a failed save may still be copying into memory that the next one is going to use
            self._staging.settle()
        # they refer to the state's tensors, and to memory that is given back at close
        self._feed = self._staging = None
        progress.ended(outcome)
        if isinstance(outcome, Saved):
            # the save is over for those who wait for it, and not for the next one
            self._carrier.protect(job, outcome.digest)

    def _staged(self, attempt: str, progress: Progress) -> None:
        progress.staged()
        if self._carrier.is_independent:
            progress.note_staged(attempt)

    def _note(self, attempt: str, source: Source, progress: Progress) -> None:
        """Write down how far the save is before it is carried out."""
        image = source if isinstance(source, Feed) and not source.is_ring else None
        if image is None or not image.is_staged:
            progress.note_requested(attempt)
        if image is not None and not self._carrier.is_independent:
            # nothing of it is written before, so it costs no time
            image.wait_over()
            progress.note_staged(attempt)


def _as_checkpoint_error(error: BaseException) -> CheckpointError:
    failed = rebuild(describe(error))
    failed.__cause__ = error
    return failed


def _require_unchanged(versions: Versions, advice: str) -> None:
    changed = versions.changed()
    if changed:
        more = f" and {len(changed) - 1} more tensors were" if len(changed) > 1 else " was"
        raise StateChanged(
            f"{changed[0]!r}{more} changed while the save still needed the values. Nothing is committed. {advice}, "
            "or save with stage='eager'",
            names=changed,
        )
