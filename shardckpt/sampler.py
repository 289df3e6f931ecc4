# SPDX-License-Identifier: Apache-2.0
"""The order of the data: `ElasticSampler` can be saved on one world size and taken up on another."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torch.utils.data import Sampler

from shardckpt.errors import ConfigError

Batch = TypeVar("Batch")
Words = npt.NDArray[np.uint64]

_ROUNDS = 4
_MAX_EPOCH = 2**48
_IDENTITY = ("num_samples", "seed", "shuffle")
_POSITION = ("epoch", "consumed")


class ElasticSampler(Sampler[list[int]]):
    """Deals global batches out to the ranks; its state is how many samples all ranks together have consumed.

    ::

        sampler = ElasticSampler(len(dataset), global_batch=96, seed=0)
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=2)
        for epoch in range(sampler.epoch, epochs):
            for batch in sampler.track(loader):
                train_step(batch)
                ckpt.save(step, {"model": model, "sampler": sampler})

    Each epoch has one order of all samples, which depends on the seed and the epoch only. A global batch is
    the next ``global_batch`` samples of that order, and each rank takes its contiguous share of them. So the
    global batches are the same on any world size, and a run that goes on with another number of ranks sees
    each remaining sample once, in the order in which it would have come.

    A batch counts as consumed when `track` hands it to the training loop, not when a worker of the loader
    prefetches it. Save after the training step of a batch, not before it. To ask for the state when batches
    were taken past `track` is an error, since the place is not known then.

    The shares of a global batch that the world size does not divide differ by one sample. A mean over ranks
    of means is then not the mean over samples: weigh a rank's loss by ``len(share) * world_size /
    global_batch``.

    Parameters
    ----------
    num_samples:
        Length of the dataset.
    global_batch:
        Samples per step, of all ranks together; at least one per rank. May change between runs.
    seed:
        Chooses the orders; in [0, 2**63).
    shuffle:
        False keeps the samples in the order of the dataset.
    drop_last:
        What happens to the last ``num_samples % global_batch`` samples of an epoch: True leaves them out,
        False makes them a smaller batch, which must still have a sample for every rank.
    rank, world_size:
        Place among the ranks that share the data, by default all of torch.distributed. With tensor or
        pipeline parallelism give the rank and size of the data-parallel group.

    Raises `ConfigError` for values out of range.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.rank, self.world_size = _place(rank, world_size, os.environ)
        self.num_samples = _integer("num_samples", num_samples, 1, 2**62)
        self.global_batch = _integer("global_batch", global_batch, self.world_size, 2**62)
        self.seed = _integer("seed", seed, 0, 2**63 - 1)
        self.shuffle = shuffle
        self.drop_last = drop_last
        self._epoch = 0
        self._consumed = 0
        self._drawn = 0
        self._tracked = False
        self._check_last_batch(0)

    @property
    def epoch(self) -> int:
        """The epoch that the next batch is from; it goes up when `track` has come to the end of one."""
        return self._epoch

    @property
    def consumed(self) -> int:
        """Samples of this epoch that the training loops of all ranks together have been given."""
        return self._consumed

    def __len__(self) -> int:
        """Batches left in this epoch."""
        left = self.num_samples - self._consumed
        return left // self.global_batch if self.drop_last else -(-left // self.global_batch)

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's share of each batch that is left in the epoch, as indices into the dataset."""
        return self._shares(self._epoch, self._consumed)

    def track(self, loader: Iterable[Batch], *, repeat: bool = False) -> Iterator[Batch]:
        """Iterate over the rest of the epoch through ``loader``, and count each batch as it is handed out.

        ``loader`` is whatever draws from this sampler: a ``DataLoader(..., batch_sampler=sampler)`` (or
        ``sampler=sampler, batch_size=None`` for a dataset that takes a list of indices), or the sampler
        itself. It must yield once for each batch drawn. With ``repeat`` the next epochs follow, without end.

        Raises `ConfigError` when the loader does not draw from this sampler, or when `load_state_dict`
        changed the place while the loop was running.
        """
        while True:
            epoch, place, drawn_before = self._epoch, self._consumed, self._drawn
            for count, batch in enumerate(loader, 1):
                if self._drawn - drawn_before < count:
                    raise ConfigError(
                        "track() was given a loader that takes no indices from this sampler; "
                        "make it with DataLoader(dataset, batch_sampler=sampler)"
                    )
                place = min(place + self.global_batch, self.num_samples)
                self._consumed = place
                self._tracked = True
                yield batch
                if (self._epoch, self._consumed) != (epoch, place):
                    raise ConfigError(
                        "the sampler's place was changed inside a track() loop; "
                        "load its state before the loop, and run one loop at a time"
                    )
            self._epoch, self._consumed = epoch + 1, 0
            if not repeat:
                return

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, as JSON values that are equal on all ranks.

        Raises `ConfigError` when batches were drawn but none of them through `track`.
        """
        if self._drawn and not self._tracked:
            raise ConfigError(
                "batches were drawn from this sampler, but not through track(), so its place is not known; "
                "write the loop as: for batch in sampler.track(loader)"
            )
        return {
            "num_samples": self.num_samples,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "epoch": self._epoch,
            "consumed": self._consumed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the place that ``state`` says; world size and global batch may be others than at the save.

        Raises `ConfigError` when the state is of another dataset length, seed or shuffle setting (in another
        order of the data the place means nothing: samples would be repeated or left out), or is none at all.
        """
        if not isinstance(state, Mapping) or set(state) != {*_IDENTITY, *_POSITION}:
            wanted = ", ".join((*_IDENTITY, *_POSITION))
            raise ConfigError(f"not a state of an ElasticSampler; wanted the keys {wanted}; got {state!r}")
        for name in _IDENTITY:
            ours, stored = getattr(self, name), state[name]
            if type(ours) is not type(stored) or ours != stored:
                raise ConfigError(
                    f"the sampler was saved with {name}={stored!r} and is now made with {name}={ours!r}: "
                    "that is another order of the data, in which the saved place means nothing; "
                    f"use {name}={stored!r}",
                    name=name,
                    stored=stored,
                    given=ours,
                )
        epoch = _integer("epoch", state["epoch"], 0, _MAX_EPOCH)
        consumed = _integer("consumed", state["consumed"], 0, self.num_samples)
        self._check_last_batch(consumed)
        self._epoch, self._consumed = epoch, consumed
        self._drawn, self._tracked = 0, False

    def _shares(self, epoch: int, start: int) -> Iterator[list[int]]:
        """This rank's share of each batch from position ``start`` of the order of ``epoch``."""
        while start < self.num_samples:
            size = min(self.global_batch, self.num_samples - start)
            if size < self.global_batch and self.drop_last:
                return
            first = start + self.rank * size // self.world_size
            stop = start + (self.rank + 1) * size // self.world_size
            self._drawn += 1
            yield self._order(epoch, first, stop)
            start += size

    def _order(self, epoch: int, first: int, stop: int) -> list[int]:
        """The samples at positions ``first`` to ``stop`` of the order of ``epoch``."""
        if not self.shuffle:
            return list(range(first, stop))
        positions = np.arange(first, stop, dtype=np.uint64)
        return [int(index) for index in _permute(positions, self.num_samples, self.seed, epoch)]

    def _check_last_batch(self, consumed: int) -> None:
        last = (self.num_samples - consumed) % self.global_batch
        if 0 < last < self.world_size and not self.drop_last:
            raise ConfigError(
                f"the last batch of the epoch has {last} samples for {self.world_size} ranks, and a rank "
                "without any cannot take part in the step; use drop_last=True, or another global_batch than "
                f"{self.global_batch}"
            )


def _permute(positions: Words, length: int, seed: int, epoch: int) -> Words:
    """Where a permutation of ``range(length)``, chosen by ``seed`` and ``epoch``, sends each of ``positions``.

    A Feistel network over the next power of two, walked until it lands inside ``range(length)``. It needs no
    table, so a dataset of any length costs nothing at start and at resume, and it is plain integer
    arithmetic, so the order does not change with the version of any library.
    """
    bits = max(2, (length - 1).bit_length())
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    counter: Words = np.arange(epoch * 2 * _ROUNDS, (epoch + 1) * 2 * _ROUNDS, dtype=np.uint64)
    keys = _mix(_mix(np.array([seed], dtype=np.uint64)) + counter)
    result: Words = positions.copy()
    walking = np.ones(len(result), dtype=bool)
    while walking.any():
        high, low = result[walking] >> low_bits, result[walking] & low_mask
        for key in keys.reshape(_ROUNDS, 2):
            high ^= _mix(low + key[0]) & high_mask
            low ^= _mix(high + key[1]) & low_mask
        result[walking] = (high << low_bits) | low
        walking = result >= np.uint64(length)
    return result


def _mix(words: Words) -> Words:
    """The finalizer of splitmix64: every input bit changes about half of the output bits."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Words = words ^ (words >> np.uint64(31))
    return mixed


def _place(rank: int | None, world_size: int | None, environ: Mapping[str, str]) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ConfigError(f"rank and world_size go together; got rank={rank}, world_size={world_size}")
    if rank is None or world_size is None:
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        if int(environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "WORLD_SIZE says that this process is one of several, but torch.distributed is not "
                "initialized, so every rank would take all the data; call "
                "torch.distributed.init_process_group() first, or give rank and world_size"
            )
        return 0, 1
    world_size = _integer("world_size", world_size, 1, 2**31)
    return _integer("rank", rank, 0, world_size - 1), world_size


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} must be an integer from {low} to {high}; got {value!r}", name=name)
    return value
