"""Sequences in classes of similar length, with the least that each class takes at each degree.

Bounds reason about classes, because a batch of a hundred thousand sequences has no more than a few hundred
that differ in a way that a bound could tell.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_flexsp.planner.problem import Problem

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Classes:
    """Classes of consecutive sequences. Each member is taken to be no more than the shortest of its class.

    A rank's part in one micro-batch is called a *slot*: a rank that runs n micro-batches has n slots, and a
    micro-batch of degree d fills d of them.
    """

    problem: Problem

    starts: NDArray[np.int64]
    """The shortest sequence of each class, as its number in the problem, shape (classes,)."""

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Sequences of each class, shape (classes,)."""
        return np.diff(self.starts, append=len(self.problem.tokens))

    @cached_property
    def tokens(self) -> Floats:
        """Tokens of all sequences of each class, shape (classes,)."""
        return np.add.reduceat(self.problem.tokens_array, self.starts).astype(np.float64)

    @cached_property
    def shortest_tokens(self) -> NDArray[np.int64]:
        """Tokens of the shortest sequence of each class, shape (classes,)."""
        return self.problem.tokens_array[self.starts]

    @cached_property
    def holds(self) -> NDArray[np.bool_]:
        """Whether a pack of each degree can hold the shortest member, shape (degrees, classes)."""
        return np.asarray(self.shortest_tokens <= self._pack_tokens)

    @cached_property
    def is_recomputed(self) -> NDArray[np.bool_]:
        """Whether a pack of each degree that holds members is recomputed, shape (degrees, classes)."""
        is_longer = np.asarray(self.shortest_tokens > self._degrees * self.problem.tokens_per_rank)
        return is_longer & (self.problem.recomputed_tokens_per_rank is not None)

    @cached_property
    def seconds(self) -> Floats:
        """What the shortest member takes a group of each degree, latency counted, shape (degrees, classes)."""
        return np.asarray(self._shortest_seconds + self._latencies)

    @cached_property
    def work(self) -> Floats:
        """Rank-seconds of a class at each degree, at least and without latency, shape (degrees, classes).

        Time over tokens does not decrease with length, so the shortest member's rate is the least.
        """
        return np.asarray(self._shortest_seconds * self._degrees * (self.tokens / self.shortest_tokens))

    @cached_property
    def full_slots(self) -> Floats:
        """Slots that the tokens of each class would fill, shape (degrees, classes)."""
        return self.tokens / self._slot_tokens

    @cached_property
    def exclusive_slots(self) -> Floats:
        """Slots of each degree that a class has for itself among exclusive sequences, shape (degrees, classes).

        No two *exclusive* sequences of a degree fit into one pack: each is longer than half of it. Where there
        is none so long, the longest alone is exclusive, for no pack holds it twice.
        """
        is_exclusive = np.asarray(2 * self.shortest_tokens > self._pack_tokens)
        is_exclusive[~is_exclusive.any(axis=1), -1] = self.counts[-1] == 1
        return np.asarray(is_exclusive * self._degrees * self.counts, dtype=np.float64)

    @cached_property
    def busy(self) -> Floats:
        """Rank-seconds of a class at each degree, at least, latency counted, shape (degrees, classes).

        A slot holds no more tokens than the capacity, so the latency of a full slot is the least for its tokens.
        """
        return np.asarray(self.work + self._latencies * self.full_slots)

    @cached_property
    def _shortest_seconds(self) -> Floats:
        return np.stack([self.problem.seconds_arrays[degree][self.starts] for degree in self.problem.degrees])

    @cached_property
    def _degrees(self) -> NDArray[np.int64]:
        return np.array(self.problem.degrees)[:, None]

    @cached_property
    def _slot_tokens(self) -> NDArray[np.int64]:
        """Tokens of a slot that holds members, shape (degrees, classes)."""
        problem = self.problem
        return np.where(self.is_recomputed, problem.recomputed_tokens_per_rank or 0, problem.tokens_per_rank)

    @cached_property
    def _pack_tokens(self) -> NDArray[np.int64]:
        return np.asarray(self._degrees * self._slot_tokens)

    @cached_property
    def _latencies(self) -> Floats:
        degrees = self.problem.degrees
        latencies = np.array([[self.problem.latency_seconds[degree]] for degree in degrees])
        recomputing = np.array([[self.problem.recomputing_seconds[degree]] for degree in degrees])
        return np.asarray(latencies + recomputing * self.is_recomputed)


def make_classes(problem: Problem, most: int) -> Classes:
    """At most about ``most`` classes, of as equal tokens as can be.

    They are also cut where a pack of some degree, or half of one, ends: at each degree all members are recomputed or
    none. And the longest sequence is one.
    """
    tokens = problem.tokens_array
    if len(tokens) <= most:
        return Classes(problem, np.arange(len(tokens)))
    sums = np.cumsum(tokens, dtype=np.float64)
    even = np.searchsorted(sums, np.linspace(0.0, sums[-1], most, endpoint=False)[1:])
    kinds = [(degree, recomputed) for degree in problem.degrees for recomputed in (False, True)]
    packs = np.array([problem.pack_tokens(degree, recomputed=recomputed) for degree, recomputed in kinds])
    ends = np.searchsorted(tokens, np.concatenate([packs, packs // 2]), side="right")
    cuts = np.concatenate([[0, len(tokens) - 1], even, ends])
    return Classes(problem, np.unique(cuts[cuts < len(tokens)]))
