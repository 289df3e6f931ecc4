# SPDX-License-Identifier: Apache-2.0
"""The coverage-guided fuzzer of manifests: ``python -m tests.hostile.fuzz FOUND tests/hostile/corpus``.

``FOUND`` is a folder for inputs that reach something new; options are those of libFuzzer, such as ``-max_total_time=3600``.
Any other exception than `InvalidManifest` ends it, and leaves the input in the working directory.
"""

from __future__ import annotations

import json
import sys
from random import Random

import atheris

with atheris.instrument_imports(include=["shardckpt"]):
    from shardckpt.errors import InvalidManifest
    from tests.hostile.base import encoded, examine, resealed
    from tests.hostile.mutate import mutate, mutate_text


def look(data: bytes) -> None:
    """The one property."""
    try:
        examine(data)
    except InvalidManifest as error:
        if not str(error).isprintable():
            raise ValueError("the message could steer a terminal") from error


def change(data: bytes, max_size: int, seed: int) -> bytes:
    """Another manifest, mostly with the right checksum and canonical: what is not gets nowhere."""
    random = Random(seed)
    way = random.randrange(8)
    if way == 0:
        changed: bytes = atheris.Mutate(data, max_size)
    elif way == 1:
        changed = resealed(mutate_text(data, random))
    else:
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            document = {}
        for _ in range(random.randrange(1, 4)):
            mutate(document, random)
        changed = encoded(document)
    return changed if len(changed) <= max_size else data


if __name__ == "__main__":
    atheris.Setup(sys.argv, look, custom_mutator=change)
    atheris.Fuzz()
