"""Validation on all of a set, each time: ``--full-validation``, and ``--multiple-validation-sets``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_flexsp.megatron.batches import PlannedBatch, PlannedBatches


class WholeSet:
    """Iterates over the planned batches of a validation set, over and over; ``len`` says how many batches it has.

    ``__next__`` is collective. Megatron asks for as many batches as there are, and so ends each validation where the
    next one begins; it may wrap the iterator in a generator of its own.

    Parameters
    ----------
    steps
        Batches of the set, at least 1.
    begin
        Starts at the set's first batch; called once for each validation, when that begins.
    """

    def __init__(self, steps: int, begin: Callable[[], PlannedBatches]) -> None:
        self._steps = steps
        self._begin = begin
        self._batches: PlannedBatches | None = None
        self._left = 0

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[PlannedBatch]:
        return self

    def __next__(self) -> PlannedBatch:
        if self._left == 0:
            self._batches, self._left = self._begin(), self._steps
        assert self._batches is not None
        batch = next(self._batches)
        self._left -= 1
        self._batches.prepare()
        return batch


def all_batches(total: int, size: int) -> list[range]:
    """The samples of each batch of a set of ``total``; the last one has what is left."""
    return [range(first, min(first + size, total)) for first in range(0, total, size)]
