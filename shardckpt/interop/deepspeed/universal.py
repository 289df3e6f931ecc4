# SPDX-License-Identifier: Apache-2.0
"""Universal checkpoints, as ``deepspeed/checkpoint/ds_to_universal.py`` writes them: one file per parameter and state."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from ...errors import InvalidForeignCheckpoint, MissingFile
from ...layout import Ints
from .arrays import Array, array_of
from .classes import TensorRef
from .directory import Files
from .zero import Trained, owners_of, shapes_of


def read_universal(files: Files, model: Mapping[str, Any]) -> Trained:
    """All that the files of parameters hold. Raises `MissingFile` and `InvalidForeignCheckpoint`."""
    path = f"{files.tag}/" if files.tag else ""
    common = files.read(f"{path}zero/optimizer_state.pt")
    groups = [dict(group) for group in common.get("param_groups", ())]
    trained = Trained(groups=groups, stage=common.get("zero_stage", 1), common=common)
    shapes_by_group = shapes_of(model)
    owner = owners_of(groups, len(shapes_by_group))
    for number, shapes in enumerate(shapes_by_group):
        for name, shape in shapes.items():
            states = files.states.get(name, {})
            if "fp32" not in states:
                raise MissingFile(f"{files.place} has no file zero/{name}/fp32.pt: it was not converted whole", name=name)
            found = {key: _value(files, name, file, shape) for key, file in states.items()}
            trained.masters[name] = found.pop("fp32")
            trained.states[name] = found
            trained.group_of[name] = owner.get(number, number)
    return trained


def _value(files: Files, name: str, file: str, shape: Ints) -> Any:
    found = files.read(file)
    # a dict at stages 1 and 2, the flat tensor itself at stage 3
    value = found.get("param") if isinstance(found, dict) else found
    if not isinstance(value, TensorRef):
        return value
    array = array_of(name, value)
    if value.numel == 1 and prod(shape) != 1:
        return array
    if value.numel != prod(shape):
        raise InvalidForeignCheckpoint(
            f"{files.place}: {file} has {value.numel} elements, and the shape of {name!r} is {list(shape)}",
            name=name,
            wanted=prod(shape),
            got=value.numel,
        )
    return Array(array.dtype, array.shape if file.endswith("/step.pt") else shape, array.parts)
