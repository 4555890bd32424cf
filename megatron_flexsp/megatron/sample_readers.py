"""Processes that read a script's samples, as Megatron's own loader has them (``--num-workers``).

Megatron's loader reads samples in their order. Here a plan says which ones come next, so processes are asked for
samples by number. PyTorch's loader does the rest: it starts the processes and ends them, and notices where one died.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

_ORDERS_UNDER_WAY = 2
"""Of each process."""
_LONGEST_ORDER = 8
"""Samples."""


class SampleReaders[T]:
    """Calls a function on sample numbers, in processes that are forked here.

    Parameters
    ----------
    read
        Gives what is wanted of a sample.
    workers
        How many processes; 0 to read in the calling thread.
    ignored
        A signal that is meant for training alone: a scheduler sends it to all processes.
    """

    def __init__(self, read: Callable[[int], T], workers: int, ignored: signal.Signals | None = None) -> None:
        self._read = read
        self._workers = workers
        self._orders: deque[list[int]] = deque()
        self._results: Iterator[list[T]] | None = None
        if workers:
            loader = DataLoader(
                _Reading(read),
                batch_sampler=_Orders(self._orders),  # type: ignore[arg-type]  # it has no end, and so no length
                num_workers=workers,
                multiprocessing_context="fork",  # pickles no data set, which Python 3.14's default does
                prefetch_factor=_ORDERS_UNDER_WAY,
                collate_fn=_as_they_are,
                worker_init_fn=None if ignored is None else _Ignoring(ignored),
                generator=torch.Generator(),  # or it would draw from the one that drops activations on a CPU
            )
            self._results = iter(loader)

    def read(self, samples: Sequence[int]) -> list[T]:
        """What is wanted of these samples, in their order."""
        if self._results is None:
            return [self._read(sample) for sample in samples]
        size = min(_LONGEST_ORDER, -(-len(samples) // self._workers))
        self._orders.extend(list(samples[first : first + size]) for first in range(0, len(samples), max(size, 1)))
        found: list[T] = []
        while len(found) < len(samples):
            found += next(self._results)  # of orders that were empty, first
        return found


class _Reading(Dataset[Any]):
    def __init__(self, read: Callable[[int], Any]) -> None:
        self._read = read

    def __getitems__(self, samples: list[int]) -> list[Any]:
        return [self._read(sample) for sample in samples]


class _Orders:
    """What the processes are told to read: nothing, where nothing is asked for, since the loader always wants more."""

    def __init__(self, waiting: deque[list[int]]) -> None:
        self._waiting = waiting

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield self._waiting.popleft() if self._waiting else []


class _Ignoring:
    def __init__(self, ignored: signal.Signals) -> None:
        self._ignored = ignored

    def __call__(self, worker: int) -> None:
        signal.signal(self._ignored, signal.SIG_IGN)


def _as_they_are(samples: list[Any]) -> list[Any]:
    return samples
