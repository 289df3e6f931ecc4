# SPDX-License-Identifier: Apache-2.0
"""A directory of DeepSpeed's checkpoints: which tag, and which files of it belong together.

The names are those of ``deepspeed/runtime/engine.py`` (``_get_ckpt_name``, ``_get_zero_ckpt_name``) of 0.3 to 0.19.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from ...errors import CheckpointNotFound, InvalidForeignCheckpoint, MissingFile, UnsupportedForeignCheckpoint
from ...store import Store
from .archive import Archive
from .pickles import read_objects

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"((?:bf16_|fp16_)?)zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_STATE = re.compile(r"zero/(.+)/([^/]+)\.pt")
_FOREIGN = {
    re.compile(r"layer_\d+.*-model_.*"): "a model of pipeline stages",
    re.compile(r"(layer_\d+_)?expert_\d+_.*|expp_rank_\d+_.*"): "experts (MoE)",
}
LATEST = ("latest", "latest_universal")
_LATEST_LIMIT = 4096


@dataclass(frozen=True)
class Files:
    """The files of one tag, by what they hold."""

    store: Store
    """Where they are."""
    tag: str
    """Name of the directory."""
    model: dict[int, str]
    """Files of the model by data-parallel rank; without ZeRO 3 just one, of rank 0."""
    optimizer: dict[int, str]
    """Partitions of the optimizer by data-parallel rank."""
    states: dict[str, dict[str, str]]
    """In a universal checkpoint, by parameter: files by the key of its state, ``fp32`` for the weights."""
    prefix: str
    """``bf16_`` where the names of partitions begin so."""

    @property
    def is_universal(self) -> bool:
        """Whether it was written by ``ds_to_universal``."""
        return bool(self.states)

    @property
    def place(self) -> str:
        """The directory, for messages."""
        return f"{self.store.url}/{self.tag}".rstrip("/")

    def read(self, name: str) -> Any:
        """The objects in a file."""
        with closing(Archive(self.store, name)) as archive:
            return read_objects(archive)


def find_tag(store: Store, tag: str | None) -> str:
    """The tag to read, which ``latest`` says when it is not given; "" when the store is the directory of a tag itself.

    Raises `CheckpointNotFound`.
    """
    if tag is not None:
        return tag
    for name in LATEST:
        try:
            return store.get(name, _LATEST_LIMIT).decode("utf-8", "replace").strip()
        except MissingFile:
            continue
    if any(_MODEL.fullmatch(entry.name) or _OPTIMIZER.fullmatch(entry.name) for entry in store.list()):
        return ""
    raise CheckpointNotFound(
        f"{store.url} has no file 'latest', and no files of DeepSpeed either: name the directory that was given to "
        "save_checkpoint, with the tag if there is no 'latest'",
        url=store.url,
    )


def open_directory(store: Store, tag: str | None = None) -> Files:
    """Find the files of a tag. Raises `CheckpointNotFound`, `MissingFile`, and `UnsupportedForeignCheckpoint` by name."""
    found = find_tag(store, tag)
    entries = [entry.name for entry in store.list(found)] if found else [entry.name for entry in store.list()]
    names = [name.removeprefix(f"{found}/") for name in entries]
    if not names:
        raise CheckpointNotFound(
            f"{store.url}: there is no tag {found!r}{', which the file latest names' if tag is None else ''}: its save was "
            "not finished, or it was removed. Choose another one with tag=",
            url=store.url,
            tag=found,
        )
    place = f"{store.url}/{found}".rstrip("/")
    _require_known(place, names)
    path = f"{found}/" if found else ""
    model = {int(m[1] or 0): path + m[0] for m in map(_MODEL.fullmatch, names) if m}
    partitions = [m for m in map(_OPTIMIZER.fullmatch, names) if m]
    if len({m[1] for m in partitions}) > 1:
        raise InvalidForeignCheckpoint(
            f"{place} has partitions with and without the prefix 'bf16_': of two saves with one tag. Remove the older ones",
            tag=found,
        )
    states: dict[str, dict[str, str]] = {}
    for m in map(_STATE.fullmatch, names):
        if m:
            states.setdefault(m[1], {})[m[2]] = path + m[0]
    optimizer = {int(m[2]): path + m[0] for m in partitions}
    if 0 not in model:
        raise MissingFile(
            f"{place} has no file of the model's state (..._model_states.pt of rank 0)", name=f"{path}model_states"
        )
    _require_all(place, model)
    _require_all(place, optimizer)
    return Files(store, found, model, optimizer, states, partitions[0][1] if partitions else "")


def _require_known(place: str, names: Iterable[str]) -> None:
    for name in names:
        what = next((what for pattern, what in _FOREIGN.items() if pattern.fullmatch(name)), None)
        ranked = _MODEL.fullmatch(name) or _OPTIMIZER.fullmatch(name)
        if what is None and ranked and int(ranked[ranked.re.groups]):
            what = "parts of tensor parallel or pipeline ranks"
        if what is not None:
            raise UnsupportedForeignCheckpoint(
                f"{place}: {name} is of {what}, which is not read. Only data-parallel training (ZeRO) is: export the model "
                "from DeepSpeed itself",
                name=name,
                what=what,
            )


def _require_all(place: str, files: dict[int, str]) -> None:
    absent = sorted(set(range(max(files, default=-1) + 1)) - set(files))
    if absent:
        raise MissingFile(
            f"{place}: the files of ranks {absent} are missing, beside {next(iter(files.values()))!r}. The directory was not "
            "copied whole, or a rank died in the save: import another tag",
            name=place,
            ranks=absent,
        )
