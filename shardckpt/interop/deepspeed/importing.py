# SPDX-License-Identifier: Apache-2.0
"""Import: a directory of DeepSpeed becomes a step of a root, a few megabytes at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from ...coordinate import Coordinator
from ...errors import AlreadyCommitted
from ...events import Timings
from ...layout import ITEMSIZE
from ...manifest import step_directory
from ...options import Options
from ...root import Root
from ...saving import Saved, Saver
from ...store import open_store
from .contents import Contents, read_contents
from .reading import SourceData


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import has written, or would write."""

    source: str
    """The directory of the tag."""
    tag: str
    """Its name."""
    step: int
    """``global_steps``, which becomes the step."""
    tensors: int
    """Number of tensors, tied ones once."""
    bytes: int
    """Bytes of these."""
    saved: Saved | None
    """The checkpoint; None of a dry run."""


def import_deepspeed(
    source: str | os.PathLike[str],
    root: str | os.PathLike[str],
    *,
    tag: str | None = None,
    dry_run: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
    options: Options | None = None,
) -> Imported:
    """Write what DeepSpeed saved in the directory ``source`` as a step of the `Checkpointer`'s root ``root``.

    The step is ``global_steps``; what it holds, and which errors are raised for ``source``, is as for `load`. Nothing is in
    ``root`` before all of it is durable, and the source is not touched. Memory is taken for what stands in the pickles and
    for one buffer of 4 to 16 MiB per worker, whatever the size of the model. ``progress`` is called with bytes done and bytes
    in all. With torch.distributed set up it is collective, and the ranks share the work. Raises `AlreadyCommitted` when the
    root has the step already. With ``dry_run`` all descriptions are read and nothing is written.
    """
    options, store = options or Options(), open_store(root)
    contents = read_contents(open_store(source), tag)
    nbytes = _nbytes(contents)
    where = f"{open_store(source).url}/{contents.tag}".rstrip("/")
    if dry_run:
        if contents.step in Root(store).steps():
            raise AlreadyCommitted(f"{store.url} has step {contents.step} already", step=contents.step)
        return Imported(where, contents.tag, contents.step, len(_distinct(contents)), nbytes, None)
    prefix = f"{step_directory(contents.step)}/"
    with Coordinator.connect(timeout=options.timeout) as coordinator:
        saver, timings = Saver(coordinator, store, options), Timings()
        metadata = {"deepspeed_tag": contents.tag}
        prepared = saver.prepare(prefix, contents.step, contents.tree, metadata, timings)
        data = SourceData(prepared.data, open_store(source), contents.arrays, progress)
        prepared.data = data
        try:
            saved = saver.finish(prepared, timings)
            saver.protect(prepared, saved)
        finally:
            data.close()
    return Imported(where, contents.tag, contents.step, len(_distinct(contents)), nbytes, saved)


def _distinct(contents: Contents) -> set[int]:
    return {id(array) for array in contents.arrays.values()}


def _nbytes(contents: Contents) -> int:
    once = {id(array): array for array in contents.arrays.values()}
    return sum(ITEMSIZE[array.dtype] * sum(part.stop - part.start for part in array.parts) for array in once.values())
