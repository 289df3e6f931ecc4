# SPDX-License-Identifier: Apache-2.0
"""Shapes of the models that are benchmarked: a GPT of any size, and the Llama family."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from ..errors import ConfigError
from ..layout import Ints

BYTES_PER_PARAMETER = 12
"""A float32 parameter and its two float32 moments."""
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_WIDTHS = (16, 32, 64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288)
_CONTEXT = 64
_LEAST_LAYERS = 8


def parse_size(text: str) -> int:
    """Bytes of a size such as ``2.9GB`` or ``512MiB``; raises `ConfigError`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*", text, re.ASCII | re.IGNORECASE)
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None:
        raise ConfigError(f"{text!r} is not a size; write it like 2.9GB, 200MB or 512MiB")
    return int(float(found[1]) * unit)


@dataclass(frozen=True, slots=True)
class GPTShape:
    """A GPT whose parameters and Adam state take a given number of bytes."""

    width: int
    """Length of a token's vector."""
    layers: int
    """Number of blocks."""
    vocabulary: int
    """Rows of the embedding, which take what the blocks leave."""

    @property
    def context(self) -> int:
        """Rows of the position embedding."""
        return _CONTEXT

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        width = self.width
        return (self.vocabulary + self.context) * width + self.layers * _block_parameters(width) + 2 * width

    @classmethod
    def of_size(cls, nbytes: int) -> GPTShape:
        """The shape whose state has ``nbytes`` bytes, to within one row of the embedding; raises `ConfigError`."""
        parameters = nbytes // BYTES_PER_PARAMETER
        fitting = [width for width in _WIDTHS if _LEAST_LAYERS * _block_parameters(width) <= 0.8 * parameters]
        if not fitting:
            least = -(-_LEAST_LAYERS * _block_parameters(_WIDTHS[0]) * BYTES_PER_PARAMETER * 5 // 4)
            raise ConfigError(f"a state of {nbytes} bytes is too small for a GPT; the smallest has {least} bytes")
        width = fitting[-1]
        layers = int(0.85 * parameters / _block_parameters(width))
        vocabulary = (parameters - layers * _block_parameters(width) - 2 * width) // width - _CONTEXT
        return cls(width, layers, vocabulary)


def _block_parameters(width: int) -> int:
    return 12 * width * width + 13 * width


LLAMAS: dict[str, tuple[int, int, int, int, int]] = {
    "llama-8b": (4096, 32, 14336, 1024, 128256),
    "llama-70b": (8192, 80, 28672, 1024, 128256),
    "llama-405b": (16384, 126, 53248, 1024, 128256),
}
"""Width, layers, width of the feed-forward network, width of keys and values, vocabulary."""


def llama_parameters(model: str) -> Iterator[tuple[str, Ints]]:
    """Names and shapes of the parameters of a Llama 3; raises `ConfigError` for a model that is none."""
    if model not in LLAMAS:
        raise ConfigError(f"model {model!r} is not one of {', '.join(LLAMAS)}", model=model)
    width, layers, hidden, keys, vocabulary = LLAMAS[model]
    yield "tok_embeddings.weight", (vocabulary, width)
    for layer in range(layers):
        at = f"layers.{layer}"
        yield f"{at}.attention.wq.weight", (width, width)
        yield f"{at}.attention.wk.weight", (keys, width)
        yield f"{at}.attention.wv.weight", (keys, width)
        yield f"{at}.attention.wo.weight", (width, width)
        yield f"{at}.feed_forward.w1.weight", (hidden, width)
        yield f"{at}.feed_forward.w2.weight", (width, hidden)
        yield f"{at}.feed_forward.w3.weight", (hidden, width)
        yield f"{at}.attention_norm.weight", (width,)
        yield f"{at}.ffn_norm.weight", (width,)
    yield "norm.weight", (width,)
    yield "output.weight", (vocabulary, width)


def count_parameters(model: str) -> int:
    """Number of parameters of a Llama 3."""
    return sum(prod(shape) for _, shape in llama_parameters(model))
