# SPDX-License-Identifier: Apache-2.0
"""A coordinator that remembers its rounds, for tests of how much ranks talk."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from shardckpt.coordinate import Coordinator


class Recording(Coordinator):
    """Keeps the label of each round and the bytes that this rank posted to it."""

    def round(
        self,
        label: str,
        produce: Callable[[], bytes] = bytes,
        decide: Callable[[list[bytes]], bytes] = lambda payloads: b"",
        *,
        timeout: float | None = None,
        name: str | None = None,
    ) -> bytes:
        def counted() -> bytes:
            payload = produce()
            if label != "connect":
                self.log.append((label, len(payload)))
            return payload

        return super().round(label, counted, decide, timeout=timeout, name=name)

    def __enter__(self) -> Recording:
        return self

    @property
    def log(self) -> list[tuple[str, int]]:
        """(label, bytes) of each round so far in which this rank had something to post."""
        found: list[tuple[str, int]] = self.__dict__.setdefault("posted", [])
        return found

    def labels(self) -> list[str]:
        """Labels of the rounds since the last call."""
        found = [label for label, _ in self.log]
        self.log.clear()
        return found


def connect() -> Recording:
    """Meet all ranks."""
    return cast(Recording, Recording.connect(timeout=30))
