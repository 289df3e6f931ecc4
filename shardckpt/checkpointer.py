# SPDX-License-Identifier: Apache-2.0
"""`Checkpointer`: the checkpoints of one run, by step, in one root."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from time import perf_counter
from types import TracebackType
from typing import Any, ClassVar, Concatenate, Literal, ParamSpec, TypeVar

from .api import check_metadata, check_step, check_verify
from .appointment import Peers
from .background.background import Background, UnderWay
from .background.carriers import make_carrier
from .coordinate import Coordinator
from .device_staging import DeviceStaging
from .environment import default_root, default_signals, run_name, start_logger
from .errors import (
    BackgroundDied,
    CheckpointerClosed,
    CheckpointError,
    NotACheckpointRoot,
    NotShared,
    SaveDropped,
    StoreError,
    Superseded,
)
from .events import Event, Sink
from .fencing import Fence, Fencing
from .gpu import require_cuda
from .guard import STEP_GUARD
from .handle import SaveHandle
from .journal import Journal
from .loading import Restored
from .manifest import step_directory
from .meeting import require_joined
from .options import Options, Retention, Schedule
from .policy import SavePolicy
from .progress import Progress
from .pruning import RunPruner
from .readback import Verify
from .restoring import Restoring
from .root import Root
from .saving import Saver
from .store import open_store
from .targets import Selection

logger = logging.getLogger("shardckpt")

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def _one_at_a_time(
    method: Callable[Concatenate[Checkpointer, _Parameters], _Result],
) -> Callable[Concatenate[Checkpointer, _Parameters], _Result]:
    """Let in one thread at a time, and none any more when another one closes the checkpointer."""

    @wraps(method)
    def call(self: Checkpointer, /, *args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        self._require_open()
        with self._turn:
            self._require_open()
            return method(self, *args, **kwargs)

    return call


class Checkpointer:
    """Saves and restores the state of one training run, one directory per step.

    Collective: every rank of the default process group makes one and calls the same methods in the same order; a single
    process needs no process group. Usable as a context manager.
    """

    _LAZY_THREADS = 1
    """Threads that copy what is staged lazily. Tests have none: nothing is copied then before a step waits for it."""
    _open_store = staticmethod(open_store)
    """Where the root lies. Tests have stores that fail, and stores that wait."""
    _run_name = staticmethod(run_name)
    """Of which run this is a start. Tests have names, without an environment."""
    _fences: ClassVar[dict[tuple[str, str], Fence]] = {}
    """What this process has put into roots to keep earlier starts from saving there."""

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        every_steps: int | None = None,
        every_seconds: float | None = None,
        continuous: bool = False,
        max_overhead: float | None = None,
        on_event: Callable[[Event], object] | None = None,
        options: Options | None = None,
    ) -> None:
        """Open ``root`` (a path, or a URL such as ``s3://bucket/run``), which is made at the first save; by default the
        one in the environment variable ``SHARDCKPT_ROOT``.

        After each commit all steps but the ``keep_last`` newest go, and those that are multiples of ``keep_every`` stay. With
        ``keep_last`` also what saves have left behind that were killed, see `Options.grace`.
        When `should_save` says yes is up to ``every_steps``, and to one of ``every_seconds``, ``continuous`` (the next save
        begins when the last one is durable) and ``max_overhead`` (saves take at most this share of the time, say 0.02).
        ``on_event`` is called on each rank with an `Event` for each phase of a save or restore that is over, from any thread.
        """
        self._options = Options.of(options)
        require_joined()
        if self._options.pin_memory == "always":
            require_cuda("pin_memory='always'")
        self._retention = Retention(keep_last=keep_last, keep_every=keep_every)
        schedule = Schedule(
            every_steps=every_steps, every_seconds=every_seconds, continuous=continuous, max_overhead=max_overhead
        )
        self._sink = Sink(on_event)
        self._store = self._open_store(default_root() if root is None else root)
        self._root = Root(self._store)
        self._pruner = RunPruner(self._store, self._retention, self._options.grace)
        self._coordinator = Coordinator.connect(timeout=self._options.timeout)
        self._saver = Saver(self._coordinator, self._store, self._options)
        self._fencing = Fencing(self._coordinator, self._store, self._run_name(), self._fences)
        carrier = make_carrier(self._coordinator, self._store, self._options)
        local_ranks = self._coordinator.local_ranks
        self._background = Background(
            self._saver,
            self._store,
            carrier,
            self._options,
            local_ranks,
            lazy_threads=self._LAZY_THREADS,
            devices=self._make_device_staging(),
        )
        self._journal = Journal(self._store) if self._coordinator.rank == 0 else None
        self._policy = SavePolicy(schedule, Peers.of(self._coordinator, self._options.timeout))
        self._latest: SaveHandle | None = None
        self._reading: set[int] = set()
        self._turn = threading.RLock()
        self._closed = False
        if self._options.stage == "lazy":
            # once, and not for each save: the hooks of steps stay the same while training goes on
            STEP_GUARD.attach()
        _OPEN.add(self)

    @staticmethod
    def _make_device_staging() -> DeviceStaging:
        """What copies from GPUs. Tests have GPUs that are not there."""
        return DeviceStaging()

    @property
    def url(self) -> str:
        """The root."""
        return self._store.url

    def steps(self) -> list[int]:
        """The committed steps, ascending. Not collective: what this rank sees now."""
        return self._root.steps()

    @property
    def preempted(self) -> bool:
        """Whether a signal has made all ranks agree to save and stop; it changes in a call of `should_save`, on all at once."""
        return self._policy.preempted

    def should_save(self, step: int) -> bool:
        """Whether to save after this step, as the schedule and signals say: the same answer on every rank.

        Every rank calls it once per training step. It talks to no other rank, except in the step in which a save becomes
        due by time or signal: then it waits some milliseconds, and the answer is yes in that step or the next one.
        Raises `ConfigError` when there is neither a schedule nor `on_signal`, and `RankTimeout` with the ranks that are gone.
        """
        self._require_open()
        check_step(step)
        return self._policy.should_save(step)

    def on_signal(self, *signals: int, exit_status: int | None = None, leave: bool = True) -> None:
        """When one of ``signals`` comes to any rank: save once more on all of them, and leave. Without any, the environment
        variable ``SHARDCKPT_SIGNAL`` names them.

        All ranks agree on a step; in it `should_save` is true, `save` blocks until the checkpoint is durable, and then it
        raises `SystemExit` on every rank with ``exit_status``, by default 128 + the signal's number. When that save fails,
        it raises the error instead; when ranks are gone, it leaves without after 12 s, wherever training is. Not with
        ``leave=False``: look at `preempted` then, and leave in your own way. Further signals change nothing; `close` puts
        back what handled them before.

        Call it on every rank, in the main thread; `ConfigError` otherwise. ``torchrun`` passes SIGTERM on to process groups and
        kills what is left after 30 s, so a step and a save have to be shorter. Processes of data loaders are in these groups;
        those that are forked after this call live on until their parent ends them.
        """
        self._require_open()
        self._policy.on_signal(signals or default_signals(), exit_status, leave)

    @_one_at_a_time
    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        metadata: Mapping[str, Any] | None = None,
        wait: bool = False,
        verify: Verify | None = None,
    ) -> SaveHandle:
        """Save ``state`` as ``step``; return when it may be changed, as far as ``Options.stage`` says, or, with ``wait``, when
        the save is durable. ``verify="readback"`` is as for `shardckpt.save`.

        Raises `AlreadyCommitted` when the step exists (nothing is ever overwritten) and `StateError` for what cannot be
        saved. Errors of storage and of other ranks are raised by `SaveHandle.result`, and here as ``Options.on_error`` says.
        """
        begun = perf_counter()
        wait = wait or self.preempted
        check_step(step)
        check_metadata(metadata)
        check_verify(verify)
        handle = SaveHandle(step)
        journal, rank = self._journal, self._coordinator.rank
        progress = Progress(handle, self.url, rank, self._sink, journal, lambda: self._prune(step))
        try:
            if self._admit(handle, wait):
                self._attempt(progress, state, metadata or {}, wait, verify)
        finally:
            handle._add_stall(perf_counter() - begun)
        if handle is self._latest:
            self._policy.saved(UnderWay(handle, self._background))
        return handle

    @_one_at_a_time
    def restore(
        self,
        state: Mapping[str, Any],
        *,
        step: int | None = None,
        keys: Sequence[str] | None = None,
        strict: bool = True,
        convert_dtype: bool = False,
        expect_digest: str | None = None,
        fallback: bool = False,
    ) -> Restored | None:
        """Load ``step``, or the newest committed one, into ``state`` in place; None when there is none to resume from.

        Waits for a save that is under way. A ``step`` that is not committed raises `CheckpointNotFound`. The other arguments
        are those of `shardckpt.load`.

        With ``fallback``, steps that turn out to be damaged are skipped for the newest older one that is intact, and those
        that did so in an earlier restore are not tried again; ``.info.skipped`` says which, and why. What they have filled in
        part is filled anew, or `MissingNames` is raised. When no step is intact, the error of the newest one is raised.
        A save that comes to a skipped step replaces it.
        """
        check_step(0 if step is None else step)
        self._background.wait()
        self._surface()
        selection = Selection(keys=keys, strict=strict, convert_dtype=convert_dtype, expect_digest=expect_digest)
        self._saver.fence = self._fencing.ensure()
        restoring = Restoring(self._coordinator, self._store, self._options, self._sink, self._reading)
        restored = restoring.run(state, selection, step, fallback=fallback)
        self._saver.damaged = [number for number, _ in restored.info.skipped] if restored is not None else ()
        if restored is not None and keys is None:
            # what they may have damaged is replaced
            self._saver.memory_errors.start_anew()
        self._tell_start(restored)
        return restored

    def wait(self) -> None:
        """Return when no save is under way, whatever has become of it."""
        self._background.wait()

    def close(self) -> None:
        """Wait for the save that is under way, and let go of the other ranks. Collective; a second call does nothing.

        With ``on_error="raise"``, an error of the last save that nobody has seen is raised when everything is closed.
        """
        with self._turn:
            if self._closed:
                return
            self._closed = True
            _OPEN.discard(self)
            self._background.wait()
            if self._options.stage == "lazy":
                STEP_GUARD.detach()
            self._background.close()
            self._policy.close()
            self._coordinator.close()
            self._surface()

    def _attempt(
        self, progress: Progress, state: Mapping[str, Any], metadata: Mapping[str, Any], wait: bool, verify: Verify | None
    ) -> None:
        """Start a save; what is not the state's fault is raised as the options say."""
        try:
            self._start(progress, state, metadata, wait, verify)
        except CheckpointError as error:
            is_lasting = isinstance(error, NotACheckpointRoot | NotShared)
            is_tolerable = isinstance(error, StoreError | BackgroundDied) and not is_lasting
            if is_tolerable or progress.is_noted:
                progress.ended(error)
            if wait or not is_tolerable or self._options.on_error == "raise":
                # once, and not at the next call too
                progress.handle._take_error()
                raise

    def _start(
        self, progress: Progress, state: Mapping[str, Any], metadata: Mapping[str, Any], wait: bool, verify: Verify | None
    ) -> None:
        self._latest = progress.handle
        self._saver.fence = self._fencing.ensure()
        prefix = f"{step_directory(progress.handle.step)}/"
        if wait:
            prepared = self._saver.prepare(prefix, progress.handle.step, state, metadata, progress.timings, verify=verify)
            progress.note_requested(prepared.attempt)
            saved = self._saver.finish(prepared, progress.timings)
            progress.ended(saved)
            self._saver.protect(prepared, saved)
        else:
            self._background.start(progress, prefix, state, metadata, verify)

    def _admit(self, handle: SaveHandle, wait: bool) -> bool:
        """Make sure that no other save is under way; False when this one is to be skipped."""
        policy = "wait" if wait else self._options.when_busy
        if policy != "wait" and not self._agree_on_busy(policy, handle):
            return False
        self._background.wait()
        if not self.preempted:
            self._surface()
        return True

    def _agree_on_busy(self, policy: Literal["skip", "replace"], handle: SaveHandle) -> bool:
        """Have all ranks do the same with a save that may be over on some of them only."""

        def look() -> bytes:
            return (self._latest.state if self._latest and self._background.is_busy else "over").encode()

        def judge(states: list[bytes]) -> bytes:
            if set(states) == {b"over"}:
                return b"go"
            if policy == "skip":
                return b"skip"
            return b"replace" if set(states) == {b"requested"} else b"go"

        verdict = self._coordinator.round("save: another one under way", look, judge)
        under_way = self._latest.step if self._latest else None
        if verdict == b"skip":
            error = SaveDropped(f"step {handle.step} was not saved: the save of step {under_way} was still under way")
            logger.warning("%s", error)
            handle._to_failed(error)
            return False
        if verdict == b"replace":
            self._background.drop(SaveDropped(f"the save of step {under_way} was replaced by that of step {handle.step}"))
        return True

    def _prune(self, newest: int) -> None:
        """Remove expired steps and dead attempts, on rank 0. The save is durable by now, so a failure here is only logged."""
        if self._coordinator.rank != 0 or self._retention.keep_last is None:
            return
        try:
            self._pruner.committed(newest, self._reading)
        except Exception as error:
            logger.warning("could not prune %s after step %d was saved: %s", self.url, newest, error)

    def _tell_start(self, restored: Restored | None) -> None:
        if restored is not None:
            self._fencing.resumed(restored.step)
        if self._coordinator.rank == 0:
            before = f"step {restored.step} of {restored.info.world_size} ranks" if restored else "nothing"
            start_logger().info("%s: resumes from %s, goes on with %d ranks", self.url, before, self._coordinator.world_size)

    def _surface(self) -> None:
        """Raise the error of the last save, if it was not seen yet and is to end training."""
        error = self._latest._take_error() if self._latest is not None and self._latest.done() else None
        ends = self._options.on_error == "raise" or isinstance(error, Superseded | NotShared)
        if error is not None and ends and not isinstance(error, SaveDropped):
            raise error

    def _require_open(self) -> None:
        if self._closed:
            raise CheckpointerClosed(f"the Checkpointer of {self.url} is closed; make a new one", url=self.url)

    def __enter__(self) -> Checkpointer:
        self._require_open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            self.close()
        except CheckpointError:
            # logged already; it must not hide the error that ends the block
            if error is None:
                raise


_OPEN: weakref.WeakSet[Checkpointer] = weakref.WeakSet()


@atexit.register
def _finish_saves() -> None:
    """Wait for saves that are under way when the interpreter exits; background threads still run then."""
    for checkpointer in list(_OPEN):
        checkpointer.wait()
