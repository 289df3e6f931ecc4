# SPDX-License-Identifier: Apache-2.0
"""Whether ranks that should hold equal copies of a tensor do: a few elements of each are compared at every save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import xxhash

from .coordinate import Coordinator
from .errors import ReplicaDivergence
from .feed import Samples
from .layout import MeshLayout, Replicate
from .plan import Plan

_PACK = msgspec.msgpack.Encoder()


def replica_groups(plan: Plan, rank: int) -> dict[str, list[str]]:
    """Names of the tensors that other ranks hold equal copies of, by a key that is the same on just those ranks."""
    meshes: dict[object, int] = {}
    groups: dict[str, list[str]] = {}
    for tensor in plan.tensors:
        layout = tensor.layout
        if not isinstance(layout, MeshLayout) or layout.replicas == 1:
            continue
        mesh = meshes.setdefault(layout.mesh, len(meshes))
        at = layout.mesh.coordinate(rank)
        if at is not None:
            cell = [-1 if isinstance(p, Replicate) else c for p, c in zip(layout.placements, at, strict=True)]
            groups.setdefault(f"{mesh}:{cell}", []).append(tensor.name)
    return groups


def condense(samples: Samples) -> dict[str, bytes]:
    """One digest per group of tensors, which is all that ranks send when everything is well."""
    # by name: each rank has looked at them in an order of its own
    return {
        key: xxhash.xxh3_64_digest(b"".join(digest.to_bytes(8, "big") for _, digest in sorted(digests.items())))
        for key, digests in samples.items()
    }


def find_diverging(condensed: Sequence[Mapping[str, bytes]]) -> tuple[str, ...]:
    """Keys of the groups whose digests are not equal on all ranks that have them."""
    first: dict[str, bytes] = {}
    diverging = {key: None for mine in condensed for key, digest in mine.items() if first.setdefault(key, digest) != digest}
    return tuple(diverging)


def raise_divergence(coordinator: Coordinator, samples: Samples, key: str) -> None:
    """Find the name that differs in a group that does, and raise `ReplicaDivergence` on all ranks. Collective."""

    def compare(payloads: list[bytes]) -> bytes:
        by_rank = [msgspec.msgpack.decode(payload, type=dict[str, int]) for payload in payloads]
        for name in next(filter(None, by_rank)):
            ranks_by_digest: dict[int, list[int]] = {}
            for rank, digests in enumerate(by_rank):
                if name in digests:
                    ranks_by_digest.setdefault(digests[name], []).append(rank)
            if len(ranks_by_digest) > 1:
                raise _divergence(name, list(ranks_by_digest.values()))
        raise AssertionError("equal digests of all names have an equal digest together")

    coordinator.round("save: compare replicas", lambda: _PACK.encode(samples.get(key, {})), compare)


def _divergence(name: str, sides: Sequence[Sequence[int]]) -> ReplicaDivergence:
    described = " and ".join(f"ranks {list(ranks)}" for ranks in sides)
    return ReplicaDivergence(
        f"replicated tensor {name!r} differs between {described}. Replicas have to be equal: look for a missing "
        "all-reduce or broadcast; a tensor that is meant to differ by rank goes into PerRank(...)",
        names=[name],
        ranks=[ranks[0] for ranks in sides],
    )
