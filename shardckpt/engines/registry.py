# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint engines there are: registered by a call, or by an installed distribution with an entry point."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ..errors import ConfigError
from .base import CheckpointEngine

GROUP = "shardckpt.engines"
"""Of entry points: the name is that of the engine, the object an `EngineFactory`."""
EngineFactory = Callable[..., CheckpointEngine]
"""Makes an engine from a root and keyword arguments; a subclass of `CheckpointEngine` is one."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}", re.ASCII)


def find_entry_points() -> Iterable[EntryPoint]:
    """Those of all distributions that can be imported now."""
    return entry_points(group=GROUP)


class EngineRegistry:
    """Engines by name."""

    def __init__(self, find: Callable[[], Iterable[EntryPoint]] = find_entry_points) -> None:
        self._factories: dict[str, EngineFactory] = {}
        self._find = find

    def register(self, name: str, factory: EngineFactory) -> None:
        """As `register_checkpoint_engine`."""
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise ConfigError(
                f"name={name!r} cannot be that of a checkpoint engine: take up to 64 of a-z, 0-9, '_', '.' and '-', and a "
                "letter or digit first"
            )
        if not callable(factory):
            raise ConfigError(
                f"factory={factory!r} cannot be called: give a subclass of shardckpt.CheckpointEngine, or a function of a root "
                "that returns an engine"
            )
        if name in self._factories:
            raise ConfigError(f"name={name!r}: there is a checkpoint engine of that name already; take another one")
        self._factories[name] = factory

    def names(self) -> list[str]:
        """As `list_checkpoint_engines`."""
        return sorted({*self._factories, *(point.name for point in self._find())})

    def get(self, name: str, root: str | os.PathLike[str], **arguments: Any) -> CheckpointEngine:
        """As `get_checkpoint_engine`."""
        factory = (self._factories.get(name) if isinstance(name, str) else None) or self._load(name)
        engine = factory(root, **arguments)
        if not isinstance(engine, CheckpointEngine):
            raise ConfigError(
                f"checkpoint engine {name!r}: its factory made a {type(engine).__name__}, and no shardckpt.CheckpointEngine"
            )
        return engine

    def _load(self, name: str) -> EngineFactory:
        """The factory that the entry point of that name stands for."""
        found = sorted((point for point in self._find() if point.name == name), key=_told)
        if not found:
            raise ConfigError(f"checkpoint engine {name!r} is not known; there are: {', '.join(self.names())}")
        if len(found) > 1:
            raise ConfigError(
                f"checkpoint engine {name!r} comes from {' and from '.join(map(_told, found))}: uninstall all but one"
            )
        try:
            factory: EngineFactory = found[0].load()
        except Exception as error:  # whatever the import of somebody's module may raise
            raise ConfigError(
                f"checkpoint engine {name!r} cannot be loaded from {_told(found[0])}: {type(error).__name__}: {error}"
            ) from error
        if not callable(factory):
            raise ConfigError(f"checkpoint engine {name!r} cannot be loaded from {_told(found[0])}: that cannot be called")
        return factory


def _told(point: EntryPoint) -> str:
    owner = "an unknown distribution" if point.dist is None else f"{point.dist.name} {point.dist.version}"
    return f"{owner} ({point.value})"


_REGISTRY = EngineRegistry()


def register_checkpoint_engine(name: str, factory: EngineFactory) -> None:
    """Make ``factory``, a subclass of `CheckpointEngine` or a function that returns one, known as ``name`` in this process.

    An installed distribution does the same with an entry point of the group ``shardckpt.engines``, in its ``pyproject.toml``::

        [project.entry-points."shardckpt.engines"]
        mine = "my_package.engine:MyEngine"

    It is imported when an engine of that name is asked for. What is registered by this call comes before entry points.
    Raises `ConfigError` for a name that is taken or has other signs than a-z, 0-9, ``_.-``, and for what cannot be called.
    """
    _REGISTRY.register(name, factory)


def get_checkpoint_engine(name: str, root: str | os.PathLike[str], **arguments: Any) -> CheckpointEngine:
    """Make an engine: of the registered factory ``name``, or else of the entry point, with ``root`` and ``arguments``.

    ``sync``, ``async``, ``lazy`` and ``process`` take ``keep_last``, ``keep_every``, ``on_event`` and ``options``, as
    `Checkpointer` does. Collective, as the constructor of an engine is. Raises `ConfigError` for a name that is not known, that
    two distributions have, or whose distribution is broken, which leaves all others in use.
    """
    return _REGISTRY.get(name, root, **arguments)


def list_checkpoint_engines() -> list[str]:
    """The names that `get_checkpoint_engine` takes, sorted. Imports none of them."""
    return _REGISTRY.names()
