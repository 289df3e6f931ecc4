# SPDX-License-Identifier: Apache-2.0
"""The contestants of `bench async`, and which of them take part."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch

from .. import Options
from ..errors import ConfigError
from .async_contestants import Engine, Entrant, Nobody


def all_entrants(*, cuda: bool) -> list[Entrant]:
    """Every contestant that can take part, in the order of their turns; with ``cuda``, those that need a GPU as well."""
    entrants: list[Entrant] = [
        Nobody(),
        Engine(name="shardckpt-blocking", options=Options(), wait=True),
        Engine(name="shardckpt-eager-thread", options=Options(stage="eager", background="thread")),
        Engine(name="shardckpt-eager-process", options=Options(stage="eager", background="process")),
        Engine(name="shardckpt-lazy-thread", options=Options(stage="lazy", background="thread")),
        Engine(name="shardckpt-lazy-process", options=Options(stage="lazy", background="process")),
        Engine(name="shardckpt-none-thread", options=Options(stage="none", background="thread")),
    ]
    return entrants + _peers(cuda=cuda)


def _peers(*, cuda: bool) -> list[Entrant]:
    try:
        from .async_peers import peers
    except ImportError as error:
        raise ConfigError(
            f"DCP of torch {torch.__version__} has no stagers to compare with, torch 2.9 is the first that has: {error}"
        ) from error
    return peers(cuda=cuda)


def choose(patterns: Sequence[str], *, cuda: bool) -> list[Entrant]:
    """The contestants whose names match one of the patterns, all for none; raises `ConfigError` for one without a match."""
    entrants = all_entrants(cuda=cuda)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(entrant.name, pattern) for entrant in entrants):
            raise ConfigError(f"{pattern!r} matches no contestant; there are {', '.join(entrant.name for entrant in entrants)}")
    return [e for e in entrants if not patterns or any(fnmatch.fnmatchcase(e.name, pattern) for pattern in patterns)]
