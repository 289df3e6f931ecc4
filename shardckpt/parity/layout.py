# SPDX-License-Identifier: Apache-2.0
"""Which ranks' files share a parity, and how it is cut into slices: arithmetic that whoever writes or reads it repeats.

What is protected are the data regions of the rank files, side by side, each filled up with zeros to the longest one of its
group. Headers need no protection: they follow from the manifest. The XOR of the regions is cut into as many slices as the
group has ranks, and each rank writes one, as a file of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

PARITY_PATTERN = re.compile(r"parity-(\d{5,9})-(\d{5,9})-([0-9a-f]{8,32})\.xor\Z", re.ASCII)
PARITY_RECORD_PATTERN = re.compile(r"parity-([0-9a-f]{8,32})\.json\Z", re.ASCII)


def parity_file_name(group: int, number: int, attempt: str) -> str:
    """File name of a slice of the parity of a group."""
    return f"parity-{group:05d}-{number:05d}-{attempt}.xor"


def parity_record_name(attempt: str) -> str:
    """Name of the document that makes parity files count. It has the attempt in it, so that one which a prune came too early
    for can never be in the way of another save of the step."""
    return f"parity-{attempt}.json"


def group_ranks(hosts: Sequence[str], size: int) -> tuple[tuple[int, ...], ...]:
    """Groups of at most ``size`` ranks that differ by one rank at most, of ranks on as many hosts as can be; ascending.

    ``hosts`` is by rank. Each rank is in one group. The ranks of a host are dealt out to all groups in turn, the largest host
    first: so no group has two ranks of a host while another has none of it, and none lies within one host when the others
    have a rank for each group.
    """
    count = -(-len(hosts) // size)
    by_host: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        by_host.setdefault(host, []).append(rank)
    dealt = [rank for ranks in sorted(by_host.values(), key=len, reverse=True) for rank in ranks]
    return tuple(sorted(tuple(sorted(dealt[first::count])) for first in range(count)))


def cut_parity(sizes: Sequence[int], block_size: int) -> tuple[tuple[int, int], ...]:
    """Slices ``[start, stop)``, in bytes, of the parity of regions of ``sizes`` bytes; at most one for each, none empty.

    They begin at block borders.
    """
    length = max(sizes)
    blocks = -(-length // block_size)
    step = -(-blocks // len(sizes)) * block_size
    return tuple((start, min(start + step, length)) for start in range(0, length, step or 1))
