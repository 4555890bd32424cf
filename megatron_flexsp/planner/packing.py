"""Pack all sequences into nested micro-batches so that no rank passes a target time, if that works out.

A greedy pass in the manner of multifit bin packing (Coffman, Garey and Johnson, 1978), from the widest degree
to the narrowest. Because degrees never increase, all ranks of a block have the same history when its degree's
turn comes, so one number, the seconds so far, describes it. Each sequence goes to the narrowest degree that
holds it within capacity and target; then what a wide micro-batch has left over is topped up with shorter
sequences, which spares its ranks a further micro-batch's overhead.
"""

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import neg

from megatron_flexsp.planner.blocks import first_ranks
from megatron_flexsp.planner.plan import MicroBatch
from megatron_flexsp.planner.problem import Problem


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The choices that a greedy pass leaves open; which are best differs from batch to batch."""

    top_up_below_overheads: float = 1.25
    """Top a wide micro-batch up if its ranks have less time left than so many micro-batch overheads."""

    open_on_fullest: bool = False
    """Open a micro-batch on the block with the most seconds that still fits the target, not the fewest."""

    least_degrees: Mapping[int, int] = field(default_factory=dict)
    """Degrees below which single sequences must not go."""


@dataclass(frozen=True)
class Packing:
    """What a pass found."""

    seconds: float
    """When the last rank has ended."""

    micro_batches: tuple[MicroBatch, ...]
    """In execution order, fillers included."""


def pack(problem: Problem, target_seconds: float, rules: Rules) -> Packing | None:
    """Look for nested micro-batches whose ranks all end within the target.

    Parameters
    ----------
    problem
        The global batch.
    target_seconds
        When the last rank must have ended. With infinity the pass always succeeds.
    rules
        The choices to make on the way.

    Returns
    -------
    The packing, or None where the greedy pass found no way to meet the target.
    """
    rank_seconds = [0.0] * problem.domain_size
    rank_counts = [0] * problem.domain_size
    waiting = list(range(len(problem.tokens) - 1, -1, -1))
    admitted = {degree: _admitted(problem, degree, target_seconds) for degree in problem.degrees}
    micro_batches: list[MicroBatch] = []
    for index in range(len(problem.degrees) - 1, -1, -1):
        fit_narrower = max((admitted[degree] for degree in problem.degrees[:index]), default=0)
        level = _Level(problem, problem.degrees[index], target_seconds, rank_seconds, rank_counts)
        must, may = _split(waiting, fit_narrower, level.degree, rules.least_degrees)
        if not all(level.add(sequence) or level.open(sequence, rules) for sequence in must):
            return None
        level.close_blocks_with_time_for(rules.top_up_below_overheads * problem.overhead_seconds)
        waiting = level.top_up(may)
        level.write_back(rank_seconds, rank_counts)
        micro_batches += level.micro_batches()
    fillers = _fillers(rank_counts, problem.count_multiple)
    fillers_alone_seconds = problem.count_multiple * problem.overhead_seconds
    return Packing(max(*rank_seconds, fillers_alone_seconds), (*micro_batches, *fillers))


def _admitted(problem: Problem, degree: int, target_seconds: float) -> int:
    """How many sequences, from the shortest, an idle block of this degree can take, one at a time."""
    seconds_left = target_seconds - problem.opening_seconds(degree, count=0)
    return min(
        bisect_right(problem.tokens, problem.pack_tokens(degree)),
        bisect_right(problem.sequence_seconds[degree], seconds_left),
    )


def _split(
    waiting: list[int], fit_narrower: int, degree: int, least_degrees: Mapping[int, int]
) -> tuple[list[int], list[int]]:
    """Split what waits, longest first: what must go to this degree and what may go to a narrower one."""
    cut = bisect_right(waiting, -fit_narrower, key=neg)
    must, may = waiting[:cut], waiting[cut:]
    widened = {sequence for sequence, least_degree in least_degrees.items() if least_degree >= degree}
    if widened:
        must += [sequence for sequence in may if sequence in widened]
        may = [sequence for sequence in may if sequence not in widened]
    return must, may


def _fillers(rank_counts: Iterable[int], count_multiple: int) -> list[MicroBatch]:
    """What brings every rank to at least one micro-batch and to a multiple of ``count_multiple``."""
    return [
        MicroBatch(rank, 1, ())
        for rank, count in enumerate(rank_counts)
        for _ in range(max(count_multiple, math.ceil(count / count_multiple) * count_multiple) - count)
    ]


class _Level:
    """The blocks of one degree and the packs opened on them.

    Sequences are numbered by length, so all limits on what a pack can still take, of tokens and of time,
    come down to one number: how many sequences, from the shortest, would still fit. ``_open_packs`` holds
    the packs by that number, which makes the best fit a binary search. The number can only shrink as its
    block fills; it is brought up to date when the pack's turn comes.
    """

    def __init__(
        self,
        problem: Problem,
        degree: int,
        target_seconds: float,
        rank_seconds: list[float],
        rank_counts: list[int],
    ) -> None:
        self.degree = degree
        self._problem = problem
        self._target_seconds = target_seconds
        self._added_seconds = problem.sequence_seconds[degree]
        self._first_ranks = first_ranks(degree, problem.domain_size)
        self._block_seconds = [rank_seconds[first] for first in self._first_ranks]
        self._block_counts = [rank_counts[first] for first in self._first_ranks]
        self._opened_seconds = [
            seconds + problem.opening_seconds(degree, count)
            for seconds, count in zip(self._block_seconds, self._block_counts, strict=True)
        ]
        self._pack_blocks: list[int] = []
        self._pack_sequences: list[list[int]] = []
        self._pack_tokens_left: list[int] = []
        self._open_packs: list[tuple[int, int]] = []

    def add(self, sequence: int) -> bool:
        """Put a sequence into the open pack that it fits best; False if it fits none."""
        while True:
            best = bisect_left(self._open_packs, (sequence + 1, -1))
            if best == len(self._open_packs):
                return False
            _, pack_index = self._open_packs.pop(best)
            if self._still_fits(pack_index) > sequence:
                self._put(sequence, pack_index)
                return True
            self._reopen(pack_index)

    def open(self, sequence: int, rules: Rules) -> bool:
        """Open a pack for a sequence; False if no block has the time."""
        block = self._block_to_open(self._added_seconds[sequence], rules.open_on_fullest)
        if block is None:
            return False
        self._block_seconds[block] = self._opened_seconds[block]
        self._block_counts[block] += 1
        self._opened_seconds[block] += self._problem.opening_seconds(self.degree, self._block_counts[block])
        self._pack_blocks.append(block)
        self._pack_sequences.append([])
        self._pack_tokens_left.append(self._problem.pack_tokens(self.degree))
        self._put(sequence, len(self._pack_blocks) - 1)
        return True

    def close_blocks_with_time_for(self, seconds: float) -> None:
        """Keep open only packs whose block has less than so many seconds left until the target."""
        self._open_packs = [
            (fits, pack_index)
            for fits, pack_index in self._open_packs
            if self._target_seconds - self._block_seconds[self._pack_blocks[pack_index]] < seconds
        ]

    def top_up(self, sequences: list[int]) -> list[int]:
        """Add what fits into packs that are still open, longest first; the rest comes back."""
        rest: list[int] = []
        index = 0
        while index < len(sequences) and self._open_packs:
            most_that_fit = self._open_packs[-1][0]
            next_index = bisect_right(sequences, -most_that_fit, lo=index, key=neg)
            rest += sequences[index:next_index]
            index = next_index
            if index < len(sequences) and self.add(sequences[index]):
                index += 1
        return rest + sequences[index:]

    def write_back(self, rank_seconds: list[float], rank_counts: list[int]) -> None:
        """Tell the ranks of every block what it has come to."""
        for block, first in enumerate(self._first_ranks):
            rank_seconds[first : first + self.degree] = [self._block_seconds[block]] * self.degree
            rank_counts[first : first + self.degree] = [self._block_counts[block]] * self.degree

    def micro_batches(self) -> list[MicroBatch]:
        """The packs in the order in which they were opened."""
        return [
            MicroBatch(self._first_ranks[block], self.degree, self._positions(sequences))
            for block, sequences in zip(self._pack_blocks, self._pack_sequences, strict=True)
        ]

    def _positions(self, sequences: list[int]) -> tuple[int, ...]:
        return tuple(sorted(self._problem.positions[sequences].tolist()))

    def _block_to_open(self, added_seconds: float, fullest: bool) -> int | None:
        """The fullest or emptiest block that meets the target with a further pack, the first of equals."""
        latest = self._target_seconds - added_seconds
        opened = self._opened_seconds
        if fullest:
            best = max((seconds for seconds in opened if seconds <= latest), default=math.inf)
        else:
            best = min(opened)
        return opened.index(best) if best <= latest and best < math.inf else None

    def _still_fits(self, pack_index: int) -> int:
        seconds_left = self._target_seconds - self._block_seconds[self._pack_blocks[pack_index]]
        return min(
            bisect_right(self._problem.tokens, self._pack_tokens_left[pack_index]),
            bisect_right(self._added_seconds, seconds_left),
        )

    def _put(self, sequence: int, pack_index: int) -> None:
        block, added_seconds = self._pack_blocks[pack_index], self._added_seconds[sequence]
        self._pack_sequences[pack_index].append(sequence)
        self._pack_tokens_left[pack_index] -= self._problem.tokens[sequence]
        self._block_seconds[block] += added_seconds
        self._opened_seconds[block] += added_seconds
        self._reopen(pack_index)

    def _reopen(self, pack_index: int) -> None:
        fits = self._still_fits(pack_index)
        if fits > 0:
            insort(self._open_packs, (fits, pack_index))
