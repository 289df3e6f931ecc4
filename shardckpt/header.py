# SPDX-License-Identifier: Apache-2.0
"""The header of a rank file, which makes it a safetensors file (https://huggingface.co/docs/safetensors).

8 bytes of length, little-endian, then JSON padded with spaces. It is a cross-check: readers of a checkpoint compute where
everything lies from the manifest.
"""

from __future__ import annotations

from collections.abc import Sequence

from .layout import Piece, safetensors_code
from .manifest import HEADER_ALIGNMENT, encode_canonical
from .plan import FilePiece


def safetensors_header(pieces: Sequence[FilePiece]) -> bytes:
    """The header of a rank file, padded so that data starts at a multiple of `HEADER_ALIGNMENT`."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for found in pieces:
        code, factor = safetensors_code(found.tensor.dtype)
        shape = list(found.piece.shape)
        if factor > 1:
            shape.append(factor)
        entries[_entry_name(found)] = {
            "dtype": code,
            "shape": shape,
            "data_offsets": [found.offset, found.offset + found.nbytes],
        }
    text = encode_canonical(entries)
    length = -(-(8 + len(text)) // HEADER_ALIGNMENT) * HEADER_ALIGNMENT
    return (length - 8).to_bytes(8, "little") + text.ljust(length - 8)


def _entry_name(found: FilePiece) -> str:
    """The tensor's name; of a piece, with a suffix that says which part, so that each entry tells what it is."""
    name, piece = found.tensor.name, found.piece
    if piece == Piece.box((0,) * len(found.tensor.shape), found.tensor.shape) and name != "__metadata__":
        return name
    box = ",".join("+".join(f"{start}:{stop}" for start, stop in dim) for dim in piece.grid)
    return f"{name}@{box}[{piece.start}:{piece.stop}]" if piece.is_window else f"{name}@{box}"
