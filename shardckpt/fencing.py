# SPDX-License-Identifier: Apache-2.0
"""Fences: who is left over from an earlier start of a run cannot commit any more.

A launcher that restarts a job, on another number of ranks or on other nodes, may leave processes of the start before behind: a
background process that finishes its save, a trainer whose agent was killed, a node that was cut off. Each start of a run has a
*generation*, a number that goes up. Its mark is a file ``.fences/<run>-<generation>`` in the root, put once by rank 0 before it
looks for the step to resume from, or before its first save; so the order is that of the root, whatever the launcher does.

The rule, for a save that an old generation has not committed when a new one puts its mark:

- Whoever commits looks for a newer mark when all is ready, and only the name of the manifest is to be given to it. If there is
  one, the save fails with `Superseded`, and its files are removed. So what the new generation saves under the same number is
  its own.
- Who has looked before the mark was put may be slow. So the new generation, behind its mark, revokes the manifests of all saves
  of older ones that are under way (`shardckpt.store.Store.revoke`), and then looks what there is: nothing is added to that any
  more, however late it comes.
- An object store cannot revoke. There, whoever commits may be between its look and the manifest when the mark is put; it looks
  again behind that. Then nobody can tell whether the new generation has seen the manifest: the save is not reported as done,
  and nothing is removed. The new generation has either resumed from that step, or comes to save one of the same number: then
  the older one, which was never reported as done, gives way to it. What was committed before the mark stays for good.

Attempts at saves begin with the run (8 hex digits) and the generation (8), so file names and manifests say who made them.
Nothing of this is done in a run that has no name (see `shardckpt.environment`), and runs of different names know nothing of
each other.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import MutableMapping

import msgspec

from .coordinate import Coordinator
from .errors import AlreadyExists, StoreError, Superseded
from .manifest import MANIFEST_NAME, step_directory
from .pruning import Pruner
from .root import FENCE_DIRECTORY, Root
from .store import Store

logger = logging.getLogger("shardckpt")

_DIGITS = 8
_NAME = re.compile(rf"{re.escape(FENCE_DIRECTORY)}/([0-9a-f]{{{_DIGITS}}})-([0-9a-f]{{{_DIGITS}}})\Z", re.ASCII)
_STAMPED = re.compile(rf"([0-9a-f]{{{_DIGITS}}})([0-9a-f]{{{_DIGITS}}})[0-9a-f]{{{2 * _DIGITS}}}\Z", re.ASCII)


class Fence(msgspec.Struct, frozen=True, kw_only=True):
    """One generation of one run."""

    run: str
    """Digest of the run's name: 8 hex digits."""
    generation: int
    """From 1."""
    newest: int
    """The newest step that was committed when the mark was there; -1 without one."""

    @property
    def stamp(self) -> str:
        """What the ids of its attempts begin with: 16 hex digits."""
        return f"{self.run}{self.generation:0{_DIGITS}x}"

    def outdates(self, step: int, attempt: str) -> bool:
        """Whether a committed attempt is of an older generation, and was not there when this one began."""
        return step > self.newest and _is_older(attempt, self.run, self.generation)


class Fencing:
    """Puts the mark of this process's generation in a root, once."""

    def __init__(
        self, coordinator: Coordinator, store: Store, run: str | None, raised: MutableMapping[tuple[str, str], Fence]
    ) -> None:
        """``raised`` holds, by root and run, what this process has put already."""
        self._coordinator = coordinator
        self._store = store
        self._run = run
        self._raised = raised

    def ensure(self) -> Fence | None:
        """The fence, which stands from now on; None without a name, or, with a warning, when storage refuses. Collective."""
        if self._run is None:
            return None
        place = (self._store.url, self._run)
        if place not in self._raised:
            # In the decision, when all ranks have come: a rank that was left behind alone gets no new generation.
            packed = self._coordinator.round("fence", decide=lambda _: msgspec.msgpack.encode(self._try()))
            fence = msgspec.msgpack.decode(packed, type=Fence | None)
            if fence is None:
                return None
            self._raised[place] = fence
        return self._raised[place]

    def resumed(self, step: int) -> None:
        """This generation goes on from ``step``, which is not outdated then."""
        if self._run is not None and (place := (self._store.url, self._run)) in self._raised:
            fence = self._raised[place]
            self._raised[place] = msgspec.structs.replace(fence, newest=max(step, fence.newest))

    def _try(self) -> Fence | None:
        assert self._run is not None
        try:
            return raise_fence(self._store, self._run)
        except StoreError as error:
            logger.warning("%s: earlier starts of run %r cannot be kept from saving: %s", self._store.url, self._run, error)
            return None


def raise_fence(store: Store, run: str) -> Fence:
    """Begin the next generation of a run. Raises `StoreError`."""
    digest = hashlib.sha256(run.encode()).hexdigest()[:_DIGITS]
    claimed = 0
    while True:
        older = _generations(store, digest)
        generation = max([*older, claimed]) + 1
        if generation >= 16**_DIGITS:
            name = _mark(digest, generation - 1)
            raise StoreError(f"{name} in {store.url} is of the last start that can be counted: remove it", name=name)
        try:
            store.put_if_absent(_mark(digest, generation), b"")
        except AlreadyExists:
            continue
        except StoreError as error:
            if "claim" not in error.details:
                raise
            # by a start that is dead, or so slow that it finds the next number put, and begins anew
            claimed = generation
            continue
        if max(_generations(store, digest), default=0) > generation:
            # others were faster, by more than one number, so this one was free again
            continue
        for number in older:
            # the newest one speaks for all before it
            store.delete(_mark(digest, number))
        return Fence(run=digest, generation=generation, newest=_stop_older(store, digest, generation))


def _stop_older(store: Store, run: str, generation: int) -> int:
    """Revoke what older generations are about to commit; the newest step that is committed now, -1 without one."""
    root = Root(store)
    found = root.scan()
    steps = [files.step for files in found if files.committed]
    for files in found:
        if not files.committed and any(_is_older(attempt, run, generation) for attempt in files.by_attempt()):
            store.revoke(f"{step_directory(files.step)}/{MANIFEST_NAME}")
            if root.look_at(files.step).committed:
                steps.append(files.step)
    return max(steps, default=-1)


def require_current(store: Store, fence: Fence, step: int, *, published: bool) -> None:
    """Raise `Superseded` when a newer generation has begun; ``published`` says whether the manifest is there by now.

    Then the detail ``outcome`` is "unknown", as it is in the `StoreError` of a storage that does not tell.
    """
    try:
        newest = max(_generations(store, fence.run), default=0)
    except StoreError as error:
        if published:
            error.add(f"Whether step {step} counts is not known: a newer start of the run may have begun", outcome="unknown")
        raise
    if newest <= fence.generation:
        return
    message = (
        f"step {step} in {store.url}: this process is of start {fence.generation} of its run, and start {newest} has begun. "
        "It was left behind, and has to end; if not, something else that is told the same name uses this root: start that with "
        "SHARDCKPT_RUN=none"
    )
    if published:
        raise Superseded(f"{message}; whether the newer start has seen its checkpoint is not known", outcome="unknown")
    raise Superseded(f"{message}; nothing is committed")


def clear_outdated(store: Store, fence: Fence, step: int) -> bool:
    """Remove a committed step that gives way to this generation's; False when there is none.

    Raises `Superseded`: what is there may be what a newer generation has resumed from.
    """
    files, pruner = Root(store).look_at(step), Pruner(store)
    if files.manifest is None:
        return False
    removal = pruner.plan_step(files)
    if removal.attempt is None or not fence.outdates(step, removal.attempt):
        return False
    require_current(store, fence, step, published=False)
    logger.warning("%s: step %d was committed by an earlier start of this run after this one had begun", store.url, step)
    return pruner.remove(removal)


def _is_older(attempt: str, run: str, generation: int) -> bool:
    found = _STAMPED.match(attempt)
    return found is not None and found[1] == run and int(found[2], 16) < generation


def _generations(store: Store, run: str) -> list[int]:
    found = (_NAME.match(entry.name) for entry in store.list(FENCE_DIRECTORY))
    return [int(match[2], 16) for match in found if match is not None and match[1] == run]


def _mark(run: str, generation: int) -> str:
    return f"{FENCE_DIRECTORY}/{run}-{generation:0{_DIGITS}x}"
