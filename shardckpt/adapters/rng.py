# SPDX-License-Identifier: Apache-2.0
"""`RNGState`: the random number generators of this process, per rank."""

from __future__ import annotations

import hashlib
import importlib.util
import random
import struct
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import StateError, TargetMismatch
from .adapter import Adapter
from .base import Finish, PerRank, below
from .opening import Opening
from .saving import Saving

_PYTHON = struct.Struct("<625I?d")
_NUMPY = struct.Struct("<625I?d")


@dataclass(frozen=True, slots=True)
class RNGState:
    """Stands in a state for the generators of Python's random, NumPy (its global one), torch on CPU, and torch on the
    current device.

    Each rank stores its own. On a larger world size, ranks that the checkpoint does not have get streams of their own,
    seeded from the SHA-256 of rank 0's saved generators and their rank: the same each time, and different for each rank.
    A device's generator is restored where checkpoint and process both have that type of device.
    """


class RNGAdapter(Adapter):
    """Generators as byte tensors, so that their size does not burden the manifest."""

    def takes(self, value: object) -> bool:
        return isinstance(value, RNGState)

    def expand(self, value: RNGState, path: str, saving: Saving) -> Any:
        return PerRank(read_generators())

    def open(self, value: RNGState, path: str, opening: Opening, *, per_rank: bool) -> Finish:
        read: dict[str, torch.Tensor] = {}
        current = read_generators()
        for name in opening.stored.below(path):
            opening.used.add(name)
        for key, tensor in current.items():
            at = below(path, key)
            found = opening.stored.tensor(at)
            if found is None and key not in ("python", "numpy", "cpu"):
                continue
            source = 0 if opening.beyond else opening.here.rank
            if found is not None:
                shape = found[1].shape(source)
                tensor = torch.empty(() if shape is None else shape, dtype=torch.uint8)
            if opening.tensor(at, tensor, per_rank=True, source_rank=source):
                read[key] = tensor

        def put_back() -> RNGState:
            states = {key: tensor.numpy().tobytes() for key, tensor in read.items()}
            if opening.beyond and states:
                _seed_all(states, opening.here.rank)
            else:
                write_generators(states, path)
            return value

        return put_back


def read_generators() -> dict[str, torch.Tensor]:
    """The state of each generator as bytes."""
    version, internal, gauss = random.getstate()
    if version != 3:
        raise StateError(f"Python's random state has version {version}, not 3; leave RNGState() out of the state")
    states = {"python": _as_tensor(_PYTHON.pack(*internal, gauss is not None, gauss or 0.0))}
    if importlib.util.find_spec("numpy") is not None:
        states["numpy"] = _as_tensor(_read_numpy())
    states["cpu"] = torch.get_rng_state()
    kind = _device_type()
    if kind is not None:
        states[kind] = torch.get_device_module(kind).get_rng_state().cpu()
    return states


def _device_type() -> str | None:
    """Type of the accelerator that this process uses; asking one that is not initialized would take its memory."""
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available() and module.is_initialized():
            return kind
    return None


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _read_numpy() -> bytes:
    import numpy

    state: Any = numpy.random.get_state(legacy=False)
    if state["bit_generator"] != "MT19937":
        raise StateError(
            f"NumPy's global generator is a {state['bit_generator']}, not the MT19937 it starts as; keep your own "
            "generator in the state, as PerRank(generator.bit_generator.state), instead of RNGState()"
        )
    key = state["state"]
    return _NUMPY.pack(*key["key"].tolist(), key["pos"], bool(state["has_gauss"]), state["gauss"])


def write_generators(states: dict[str, bytes], path: str) -> None:
    """Set each generator; those that this process does not have are left out."""
    try:
        if "python" in states:
            *internal, has_gauss, gauss = _PYTHON.unpack(states["python"])
            random.setstate((3, tuple(internal), gauss if has_gauss else None))
        if "numpy" in states:
            import numpy

            *key, pos, has_gauss, gauss = _NUMPY.unpack(states["numpy"])
            numpy.random.set_state(("MT19937", numpy.array(key, numpy.uint32), pos, int(has_gauss), gauss))
        for kind in states.keys() - {"python", "numpy"}:
            module: Any = torch if kind == "cpu" else torch.get_device_module(kind)
            module.set_rng_state(_as_tensor(states[kind]))
    except (struct.error, ValueError, RuntimeError, TypeError) as error:
        raise TargetMismatch(
            f"{path!r}: the stored random number generators are not of this Python, NumPy or torch ({error})", name=path
        ) from error


def _seed_all(states: dict[str, bytes], rank: int) -> None:
    """Streams for a rank that the checkpoint does not have."""
    digest = hashlib.sha256(b"".join(states[key] for key in sorted(states)) + struct.pack("<Q", rank)).digest()
    random.seed(digest)
    if "numpy" in states:
        import numpy

        numpy.random.seed(list(struct.unpack("<8I", digest)))
    torch.manual_seed(struct.unpack("<Q", digest[:8])[0] >> 1)
