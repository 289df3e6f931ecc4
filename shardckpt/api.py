# SPDX-License-Identifier: Apache-2.0
"""`save` and `load`: one blocking call each, for one checkpoint at one place."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from .coordinate import Coordinator
from .errors import ConfigError, told
from .events import Event, Sink, Timings
from .loading import Load, Restored
from .meeting import require_joined
from .options import Options
from .readback import Verify
from .root import find_checkpoint
from .saving import Saved, Saver
from .store import open_store
from .targets import Selection


def save(
    url: str | os.PathLike[str],
    state: Mapping[str, Any],
    *,
    step: int = 0,
    metadata: Mapping[str, Any] | None = None,
    verify: Verify | None = None,
    on_event: Callable[[Event], object] | None = None,
    options: Options | None = None,
) -> Saved:
    """Save ``state`` as one checkpoint at ``url``, and return when it is durable.

    Collective: every rank calls it with its part of the state. ``step`` and ``metadata`` (a mapping of JSON values) are stored
    in the manifest. Raises `AlreadyCommitted` when ``url`` has a checkpoint already; nothing is ever overwritten. With
    ``verify="readback"`` each rank reads its file again before the commit, past this host's caches where the storage allows
    it, and a difference to what was in the tensors raises `ChecksumMismatch` on all ranks. ``on_event`` is called on each
    rank, at the end, with an `Event` for each phase of the save.
    """
    options, sink, timings = Options.of(options), Sink(on_event), Timings()
    check_step(step)
    check_metadata(metadata)
    check_verify(verify)
    store = open_store(url)
    require_joined()
    with Coordinator.connect(timeout=options.timeout) as coordinator:
        saved = Saver(coordinator, store, options).save("", step, state, metadata or {}, timings, verify)
        sink.report("save", step, coordinator.rank, timings)
        return saved


def load(
    url: str | os.PathLike[str],
    into: Mapping[str, Any] | None = None,
    *,
    keys: Sequence[str] | None = None,
    strict: bool = True,
    convert_dtype: bool = False,
    expect_digest: str | None = None,
    on_event: Callable[[Event], object] | None = None,
    options: Options | None = None,
) -> Restored:
    """Load the checkpoint at ``url``: one that `save` made, a step directory, or the newest step of a `Checkpointer`'s root.

    Collective. With ``into``, a state like the one that was saved, tensors are filled in place on any world size, mesh or
    placement. Without, ``.state`` of the result is the whole state as plain CPU tensors and values.

    ``keys`` are shell patterns of names, such as ``["model/*"]``; names that match none keep their values. Only what is below
    the top-level keys of ``into`` is looked at. ``strict=False`` reports missing and unexpected names instead of raising
    `MissingNames`. A tensor of another shape raises `ShapeMismatch`, of another dtype `DtypeMismatch` unless
    ``convert_dtype=True``. ``expect_digest`` is the digest that `save` returned; any other manifest is refused. ``on_event`` is
    called on each rank, at the end, with an `Event` for each phase of the load.
    """
    options, sink = Options.of(options), Sink(on_event)
    store = open_store(url)
    selection = Selection(keys=keys, strict=strict, convert_dtype=convert_dtype, expect_digest=expect_digest)
    with Coordinator.connect(timeout=options.timeout) as coordinator:
        prefix = coordinator.broadcast("load: find", lambda: find_checkpoint(store).encode()).decode()
        return Load(coordinator, store, prefix, selection, options, sink).run(into)


def check_step(step: int) -> None:
    """Refuse what is no step number."""
    if type(step) is not int or not 0 <= step < 10**18:
        raise ConfigError(f"step={told(step)} is not an int from 0 to 10**18 - 1")


def check_verify(verify: object) -> None:
    """Refuse what nothing is known by."""
    if verify not in (None, *get_args(Verify)):
        raise ConfigError(f"verify={verify!r} is not known; take verify='readback', or leave it out")


def check_metadata(metadata: object) -> None:
    """Refuse what is no mapping; its values are checked when they are encoded."""
    if metadata is not None and not (isinstance(metadata, Mapping) and all(type(key) is str for key in metadata)):
        raise ConfigError(f"metadata={told(metadata)} is not a mapping with str keys; write metadata={{'run': 'a'}}")
