# SPDX-License-Identifier: Apache-2.0
"""What a power cut can leave on a disk: all of it for small worlds, and samples for larger ones."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Final

from tests.power.disk import ABSENT, BLOCK, ROOT, Disk, FileState, Moment

MOST_VARIANTS: Final = 96
"""Contents of one file that are all tried; beyond that, one block at a time is lost or garbled."""
_NOTHING: Final = bytes(BLOCK)
_INVERTED: Final = bytes(255 - byte for byte in range(256))

Content = bytes | None
"""Of a file; None for a directory."""
Image = frozenset[tuple[str, Content]]
"""What is there after a power cut, by path."""
_Layout = tuple[tuple[str, int], ...]
"""Path and number of each node that is there."""


@dataclass(frozen=True)
class Crash:
    """The states that a power cut at one moment can leave."""

    moment: Moment

    def count(self) -> int:
        """How many `images` there are, those counted twice that come about in two ways."""
        return sum(prod(len(self._variants(number)) for number in self._files_of(layout)) for layout in self._layouts())

    def images(self) -> Iterator[Image]:
        """Every one: each entry kept or lost, each block kept, lost or garbled, each size kept or lost."""
        for layout in self._layouts():
            numbers = self._files_of(layout)
            for contents in itertools.product(*(self._variants(number) for number in numbers)):
                yield self._image(layout, dict(zip(numbers, contents, strict=True)))

    def sample(self, chance: random.Random, count: int) -> Iterator[Image]:
        """``count`` of the images that `images` gives, and others in which any blocks of a long file are lost or garbled."""
        for _ in range(count):
            layout = self._any_layout(chance, chance.choice((0.5, 0.95)))
            yield self._image(layout, {number: self._any_content(chance, number) for number in self._files_of(layout)})

    def _layouts(self, directory: int = ROOT, path: str = "") -> Iterator[_Layout]:
        """What may be there below a directory. Nodes without a name that is kept are not, whatever is in them."""
        choices = []
        for name, past in self.moment.directories[directory].items():
            here = f"{path}/{name}"
            choice: list[_Layout] = []
            for number in dict.fromkeys(past):
                if number == ABSENT:
                    choice.append(())
                elif number in self.moment.directories:
                    choice.extend(((here, number), *below) for below in self._layouts(number, here))
                else:
                    choice.append(((here, number),))
            choices.append(choice)
        return (tuple(itertools.chain.from_iterable(chosen)) for chosen in itertools.product(*choices))

    def _any_layout(self, chance: random.Random, kept: float, directory: int = ROOT, path: str = "") -> _Layout:
        """One layout, in which a change to an entry is kept with the probability ``kept``."""
        found: list[tuple[str, int]] = []
        for name, past in self.moment.directories[directory].items():
            number = past[-1] if chance.random() < kept else chance.choice(past)
            if number != ABSENT:
                found.append((f"{path}/{name}", number))
                if number in self.moment.directories:
                    found.extend(self._any_layout(chance, kept, number, f"{path}/{name}"))
        return tuple(found)

    def _files_of(self, layout: _Layout) -> list[int]:
        """Numbers of the files; one with two names has one content."""
        return list(dict.fromkeys(number for _, number in layout if number in self.moment.files))

    def _variants(self, number: int) -> list[bytes]:
        return variants(self.moment.files[number])

    def _any_content(self, chance: random.Random, number: int) -> bytes:
        file = self.moment.files[number]
        return _content([chance.choice(options) for options in _block_options(file)], chance.choice(file.sizes))

    def _image(self, layout: _Layout, contents: dict[int, bytes]) -> Image:
        return frozenset((path, contents.get(number)) for path, number in layout)


def variants(file: FileState) -> list[bytes]:
    """The contents that a file may come back with."""
    if file.is_durable:
        return [_content(file.blocks, file.sizes[0])]
    options = _block_options(file)
    choices: list[tuple[bytes, ...]]
    if prod(map(len, options)) * len(file.sizes) <= MOST_VARIANTS:
        choices = list(itertools.product(*options))
    else:
        kept, lost = tuple(option[0] for option in options), tuple(option[1 % len(option)] for option in options)
        choices = [kept, lost]
        for at, option in enumerate(options):
            choices.extend((*kept[:at], other, *kept[at + 1 :]) for other in option[1:])
    return list(dict.fromkeys(_content(blocks, size) for blocks in choices for size in file.sizes))


def after(image: Image, links: bool) -> Disk:
    """The disk that comes back; all that is on it is durable."""
    disk = Disk(links=links)
    for path, content in sorted(image, key=lambda node: node[0]):
        disk.put(path, content)
    return disk


def _block_options(file: FileState) -> list[list[bytes]]:
    """Of each block: as written; if that is not durable, also as before (zeros if there was nothing), and garbled."""
    options = []
    for now, before in itertools.zip_longest(file.blocks, file.durable, fillvalue=_NOTHING):
        options.append([now] if now == before else [now, before, _garbled(now)])
    return options


def _garbled(block: bytes) -> bytes:
    """The first half was written, and what was in the cache of the device went over the second one."""
    half = BLOCK // 2
    return block[:half] + block[half:].translate(_INVERTED)


def _content(blocks: tuple[bytes, ...] | list[bytes], size: int) -> bytes:
    return b"".join(blocks)[:size].ljust(size, b"\0")
