# SPDX-License-Identifier: Apache-2.0
"""Start a save in the background: agree on it, stage the state as the options say, and let a carrier finish it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from shardckpt.errors import CheckpointError, StateChanged
from shardckpt.events import Timings
from shardckpt.failure import describe, rebuild
from shardckpt.feed import Feed, LiveSource, Samples, Source
from shardckpt.guard import STEP_GUARD, Versions, owned_by_optimizers
from shardckpt.handle import SaveHandle
from shardckpt.options import Options
from shardckpt.saving import Prepared, Saved, Saver
from shardckpt.stage import wait_for_devices
from shardckpt.staging import LazyStaging, batches, stage_at_once, stage_through_ring
from shardckpt.store import Store

from .carrier import Carrier

Outcome: TypeAlias = Saved | CheckpointError


class Background:
    """Saves that go on while training does, one at a time."""

    def __init__(self, saver: Saver, store: Store, carrier: Carrier, options: Options, local_ranks: int) -> None:
        self._saver = saver
        self._store = store
        self._carrier = carrier
        self._options = options
        self._threads = max(1, min(options.workers, len(os.sched_getaffinity(0)) // local_ranks))
        self._thread: threading.Thread | None = None
        self._feed: Feed | None = None

    def start(
        self,
        handle: SaveHandle,
        prefix: str,
        state: Mapping[str, Any],
        metadata: Mapping[str, Any],
        timings: Timings,
        on_end: Callable[[Outcome], None],
    ) -> None:
        """Start a save when none is under way. Returns when the state may be changed, as far as ``Options.stage`` says.

        Collective. What the call itself gets wrong is raised here; all later errors go to ``on_end``, which is called once, in
        another thread.
        """
        prepared = self._saver.prepare(prefix, handle.step, state, metadata, timings, self._carrier.notice)
        source = self._make_source(prepared, handle, state)
        self._feed = source if isinstance(source, Feed) else None
        args = (prepared, source, timings, on_end)
        self._thread = threading.Thread(target=self._finish, args=args, name="shardckpt-save", daemon=True)
        if isinstance(source, Feed) and not source.is_ring:
            # first the copy, which training waits for
            self._stage(prepared, source, state, handle, timings)
            self._thread.start()
        else:
            self._thread.start()
            if isinstance(source, Feed):
                self._stage(prepared, source, state, handle, timings)

    def drop(self, error: CheckpointError) -> None:
        """Make the save that is under way fail, unless it is staged."""
        if self._feed is not None:
            self._feed.fail(error)

    @property
    def is_busy(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Return when no save is under way; each has deadlines of its own."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Give back memory and processes, when no save is under way."""
        self._carrier.close()

    def _make_source(self, prepared: Prepared, handle: SaveHandle, state: Mapping[str, Any]) -> Source:
        data, chunk = prepared.data, prepared.plan.chunk
        if self._options.stage == "none":
            wait_for_devices(data.tensors.values())
            versions = Versions.of(data.tensors, owned_by_optimizers(state).tensors)

            def sample() -> Samples:
                # asked for when all is written
                _require_unchanged(versions)
                return prepared.sample()

            return LiveSource(data, chunk, self._options.workers, sample)
        return self._carrier.feed(data.nbytes, chunk, handle._to_staged)

    def _stage(self, prepared: Prepared, feed: Feed, state: Mapping[str, Any], handle: SaveHandle, timings: Timings) -> None:
        try:
            data = prepared.data
            wait_for_devices(data.tensors.values())
            if feed.is_ring:
                stage_through_ring(data, feed, prepared.sample, timings)
            elif self._options.stage == "lazy":
                self._stage_lazily(prepared, feed, state, handle, timings)
                return
            else:
                stage_at_once(data, feed, batches(data, feed.chunk), self._threads, timings)
                feed.staged(prepared.sample())
        except Exception as error:
            feed.fail(error)
        prepared.release()

    def _stage_lazily(
        self, prepared: Prepared, feed: Feed, state: Mapping[str, Any], handle: SaveHandle, timings: Timings
    ) -> None:
        data = prepared.data
        is_owned = owned_by_optimizers(state)
        owned = {name: tensor for name, tensor in data.tensors.items() if is_owned(tensor)}
        stage_at_once(data, feed, batches(data, feed.chunk, lambda name: name not in owned), self._threads, timings)
        samples = prepared.sample(lambda name: name not in owned)
        versions = Versions.of(owned, is_owned.tensors)

        def finish() -> None:
            try:
                late = prepared.sample(lambda name: name in owned)
                _require_unchanged(versions)
                feed.staged({key: samples[key] | late[key] for key in samples})
            finally:
                STEP_GUARD.forget(staging)
                prepared.release()

        later = batches(data, feed.chunk, lambda name: name in owned)
        staging = LazyStaging(data, feed, later, finish, handle._add_stall, timings)
        STEP_GUARD.watch(staging)
        staging.start(1)

    def _finish(self, prepared: Prepared, source: Source, timings: Timings, on_end: Callable[[Outcome], None]) -> None:
        outcome: Outcome
        try:
            digest = self._carrier.carry(prepared.make_job(), source, prepared.notice, timings)
            outcome = prepared.describe(self._store, digest)
        except BaseException as error:
            if isinstance(source, Feed):
                # somebody may be waiting for room in it
                source.fail(error)
            outcome = error if isinstance(error, CheckpointError) else _as_checkpoint_error(error)
        on_end(outcome)


def _as_checkpoint_error(error: BaseException) -> CheckpointError:
    failed = rebuild(describe(error))
    failed.__cause__ = error
    return failed


def _require_unchanged(versions: Versions) -> None:
    changed = versions.changed()
    if changed:
        more = f" and {len(changed) - 1} more tensors were" if len(changed) > 1 else " was"
        raise StateChanged(
            f"{changed[0]!r}{more} changed while the save still needed the values. Nothing is committed. Call "
            "wait_staged() of the handle before changing tensors other than by an optimizer, or save with stage='eager'",
            names=changed,
        )
