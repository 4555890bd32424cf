"""Sees the next step's samples before they are asked for, so that they can be planned while the present step runs.

It lies beneath Megatron's ``RerunDataIterator``, which keeps what it hands out for a possible rerun: what is only
looked at is not handed out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from megatron_flexsp.planner.service import PendingPlan


class Lookahead(Iterator[Any]):
    """An iterator whose next items can be seen.

    Items are what Megatron's loaders give: a sample, or a list of samples.
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._seen: deque[Any] = deque()
        self.pending: PendingPlan | None = None
        """The plan that has been begun for the items seen."""

    @classmethod
    def beneath(cls, data_iterator: Any) -> Lookahead | None:
        """Put one beneath Megatron's iterator, or find the one that lies there; None where there is no place for it.

        Virtual pipeline stages share one iterator: theirs is the first of a list that is there.
        """
        if isinstance(data_iterator, list):
            data_iterator = next((item for item in data_iterator if item is not None), None)
        source = getattr(data_iterator, "iterable", None)
        if source is None:
            return None
        if not isinstance(source, cls):
            data_iterator.iterable = source = cls(source)
        return source

    def __next__(self) -> Any:
        return self._seen.popleft() if self._seen else next(self._source)

    def peek(self, count: int) -> list[Any]:
        """The next items, which will still come; fewer where they end."""
        self._seen.extend(islice(self._source, max(0, count - len(self._seen))))
        return list(islice(self._seen, count))


def lengths_of(items: list[Any]) -> list[int]:
    """Padded tokens of every sequence, in the order in which Megatron unpacks them."""
    samples = [sample for item in items for sample in (item if isinstance(item, list) else [item])]
    return [tokens for sample in samples for tokens in _lengths_of_sample(sample)]


def _lengths_of_sample(sample: Mapping[str, Any]) -> list[int]:
    """A sample is a sequence that knows its length, or a pack of several."""
    if "padded_seq_len" in sample:
        return [int(tokens) for tokens in sample["padded_seq_len"].reshape(-1).tolist()]
    ends = sample["cu_seqlens"].reshape(-1)
    return [int(tokens) for tokens in (ends[1:] - ends[:-1]).tolist() if tokens]
