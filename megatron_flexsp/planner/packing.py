"""Pack all sequences into nested micro-batches so that no rank passes a target time, if that works out.

A greedy pass in the manner of multifit bin packing (Coffman, Garey and Johnson, 1978), from the widest degree
to the narrowest. Because degrees never increase, all ranks of a block have the same history when its degree's
turn comes, so one number, the seconds so far, describes it. Each sequence goes to the narrowest degree that
holds it within capacity and target; then what a wide micro-batch has left over is topped up with shorter
sequences, which spares its ranks a further micro-batch's overhead. Where recomputing on few ranks is cheaper than many
ranks, or needed, it goes to a recomputed micro-batch instead.
"""

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import neg

import numpy as np
from numpy.typing import NDArray

from megatron_flexsp.planner.blocks import first_ranks
from megatron_flexsp.planner.filling import fill
from megatron_flexsp.planner.plans import MicroBatch
from megatron_flexsp.planner.problem import Problem, topping_up_pays
from megatron_flexsp.planner.recomputing import degrees_of_recomputed

_MANY_BLOCKS = 128
_WINDOW = 256


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The choices that a greedy pass leaves open; which are best differs from batch to batch."""

    top_up_below_overheads: float = 1.25
    """Top a wide micro-batch up if its ranks have less time left than so many micro-batch overheads."""

    open_on: str = "emptiest"
    """The block that a micro-batch opens on: the ``emptiest``, the ``fullest`` that still meets the target, or
    the best ``aligned``, where the time that is left suits a whole number of full narrow packs best."""

    reserve_share: float = 0.0
    """When a wide micro-batch is opened, count so much of its room as filled already: topping up will fill it."""

    top_up_at_any_price: bool = True
    """Top up also where a token's exchange costs more than its share of a further narrow micro-batch."""

    top_up_to_alignment: bool = False
    """Top up only until the time that is left would hold a full narrow pack less."""

    full_share: float = 0.0
    """How full the narrowest packs are expected to get; 0 places sequences on them as on all others."""

    even_count: int = 4
    """With a pipeline: plan for ranks that run so many micro-batches, none longer than if all were equal."""

    least_degrees: Mapping[int, int] = field(default_factory=dict)
    """Degrees below which single sequences must not go, unless they are recomputed."""

    recomputing_price: float = 1.0
    """Choose as if recomputing took so many times the rank-seconds that it takes; with infinity, only where a sequence
    fits in no other way."""


@dataclass(frozen=True)
class Packing:
    """What a pass found."""

    seconds: float
    """When the last rank has ended."""

    levels: Sequence["_Level"]
    """The packs of each degree, widest first; those that are recomputed before the others."""

    fillers: Sequence[MicroBatch]
    """What brings every rank's count to what it must be."""

    @cached_property
    def micro_batches(self) -> tuple[MicroBatch, ...]:
        """In execution order, fillers included. Of many passes only the best is asked for them."""
        return (*(item for level in self.levels for item in level.micro_batches()), *self.fillers)


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
    most_seconds = math.inf
    if problem.pipeline_stages > 1 and target_seconds < math.inf:
        most_seconds = target_seconds / (rules.even_count + problem.pipeline_stages - 1)
        target_seconds = rules.even_count * most_seconds
    rank_seconds = [0.0] * problem.domain_size
    rank_counts = [0] * problem.domain_size
    admitted = {degree: _admitted(problem, degree, target_seconds, most_seconds) for degree in problem.degrees}
    recomputed = degrees_of_recomputed(problem, target_seconds, most_seconds, rules.recomputing_price)
    if recomputed is None:
        return None
    waiting = [sequence for sequence in range(len(problem.tokens) - 1, -1, -1) if sequence not in recomputed]
    levels: list[_Level] = []
    for index in range(len(problem.degrees) - 1, -1, -1):
        degree = problem.degrees[index]
        fit_narrower = max((admitted[narrower] for narrower in problem.degrees[:index]), default=0)
        if degree in recomputed.values():
            level = _Level(problem, degree, target_seconds, most_seconds, rank_seconds, rank_counts, recomputed=True)
            levels.append(level)
            longest_first = sorted((each for each, home in recomputed.items() if home == degree), reverse=True)
            if not all(level.add(sequence) or level.open(sequence, rules) for sequence in longest_first):
                return None
            level.write_back(rank_seconds, rank_counts)
        level = _Level(problem, degree, target_seconds, most_seconds, rank_seconds, rank_counts)
        levels.append(level)
        if index == 0:
            if level.is_hopeless(waiting):
                return None
            if rules.full_share and target_seconds < math.inf and most_seconds == math.inf:
                if not level.fill(waiting, rules.full_share):
                    return None
                level.write_back(rank_seconds, rank_counts)
                break
        must, may = _split(waiting, fit_narrower, level.degree, rules.least_degrees)
        if not all(level.add(sequence) or level.open(sequence, rules) for sequence in must):
            return None
        level.close_blocks_with_time_for(rules.top_up_below_overheads * problem.overhead_seconds)
        level.aligned_top_up = rules.top_up_to_alignment
        waiting = level.top_up(may) if rules.top_up_at_any_price or topping_up_pays(problem, level.degree) else may
        level.write_back(rank_seconds, rank_counts)
    fillers_alone_seconds = problem.count_multiple * problem.overhead_seconds
    packing = Packing(max(*rank_seconds, fillers_alone_seconds), levels, _fillers(rank_counts, problem.count_multiple))
    if problem.pipeline_stages > 1:
        return replace(packing, seconds=path_seconds(problem, packing.micro_batches))
    return packing


def path_seconds(problem: Problem, micro_batches: Sequence[MicroBatch]) -> float:
    """The step of nested micro-batches, fillers among them, with the pipeline's fill and drain (``step_seconds``)."""
    numbers = np.empty(len(problem.tokens), dtype=np.int64)
    numbers[problem.positions] = np.arange(len(problem.tokens))
    seconds, longest = np.zeros(problem.domain_size), np.zeros(problem.domain_size)
    for item in micro_batches:
        taken = problem.overhead_seconds
        if not item.is_filler:
            work = problem.seconds_arrays[item.degree][numbers[list(item.sequences)]]
            taken += problem.micro_batch_latency(item.degree, recomputed=item.recomputed) + float(work.sum())
        ranks = slice(item.first_rank, item.first_rank + item.degree)
        seconds[ranks] += taken
        longest[ranks] = np.maximum(longest[ranks], taken)
    return float((seconds + (problem.pipeline_stages - 1) * longest).max())


def _admitted(problem: Problem, degree: int, target_seconds: float, most_seconds: float) -> int:
    """How many sequences, from the shortest, an idle block of this degree can take, one at a time."""
    seconds_left = min(
        target_seconds - problem.opening_seconds(degree, count=0),
        most_seconds - problem.overhead_seconds - problem.latency_seconds[degree],
    )
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


def with_fillers(problem: Problem, micro_batches: Sequence[MicroBatch]) -> tuple[MicroBatch, ...]:
    """The micro-batches, and the fillers that bring every rank's count to what it must be."""
    counts = [0] * problem.domain_size
    for item in micro_batches:
        for rank in item.ranks:
            counts[rank] += 1
    return (*micro_batches, *_fillers(counts, problem.count_multiple))


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
        most_seconds: float,
        rank_seconds: list[float],
        rank_counts: list[int],
        *,
        recomputed: bool = False,
    ) -> None:
        self.degree = degree
        self._recomputed = recomputed
        self._problem = problem
        self._pack_tokens = problem.pack_tokens(degree, recomputed=recomputed)
        self._target_seconds = target_seconds
        self._tokens = problem.tokens
        self._added_seconds = problem.sequence_seconds[degree]
        self._first_ranks = first_ranks(degree, problem.domain_size)
        self._block_seconds = [rank_seconds[first] for first in self._first_ranks]
        self._block_counts = [rank_counts[first] for first in self._first_ranks]
        self._opened_seconds: list[float] | NDArray[np.float64] = [
            seconds + problem.opening_seconds(degree, count, recomputed=recomputed)
            for seconds, count in zip(self._block_seconds, self._block_counts, strict=True)
        ]
        self._pack_blocks: list[int] = []
        self._pack_sequences: list[list[int]] = []
        self._pack_tokens_left: list[int] = []
        self._pack_seconds_left: list[float] = []
        latency = problem.micro_batch_latency(degree, recomputed=recomputed)
        self._most_work_seconds = most_seconds - problem.overhead_seconds - latency
        self._open_packs: list[tuple[int, int]] = []
        self.aligned_top_up = False
        if len(self._first_ranks) > _MANY_BLOCKS:
            self._opened_seconds = np.array(self._opened_seconds)
        # The same, with what has been reserved in packs that are open.
        self._planned_seconds = self._opened_seconds.copy()
        self._window = 0
        self._rate = self._added_seconds[0] / problem.tokens[0]
        narrow = problem.degrees[0]
        rate = problem.sequence_seconds[narrow][len(problem.tokens) // 2] / problem.tokens[len(problem.tokens) // 2]
        self._aligned_seconds = max(1e-30, problem.opening_seconds(narrow, 0) + rate * problem.pack_tokens(narrow))

    def is_hopeless(self, sequences: list[int]) -> bool:
        """Whether the sequences need more time, all blocks taken together, than there is until the target."""
        if self._target_seconds == math.inf:
            return False
        tokens = sum(self._problem.tokens[sequence] for sequence in sequences)
        packs = -(-tokens // self._pack_tokens)
        paid = sum(-count % self._problem.count_multiple for count in self._block_counts)
        needed = sum(self._added_seconds[sequence] for sequence in sequences)
        needed += max(0, packs - paid) * self._problem.overhead_seconds
        return needed > len(self._block_seconds) * self._target_seconds - sum(self._block_seconds)

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
        # Recomputed packs are not topped up.
        rate = 0.0 if self._recomputed else rules.reserve_share * self._rate
        reserve = rate * (self._pack_tokens - self._problem.tokens[sequence])
        block = None
        if reserve > 0:
            latest = self._target_seconds - self._added_seconds[sequence] - reserve
            block = self._block_to_open(self._planned_seconds, latest, rules.open_on)
        if block is None:
            latest = self._target_seconds - self._added_seconds[sequence]
            block = self._block_to_open(self._opened_seconds, latest, rules.open_on)
        if block is None:
            return False
        self._block_seconds[block] = self._opened_seconds[block]
        self._block_counts[block] += 1
        count = self._block_counts[block]
        opening = self._problem.opening_seconds(self.degree, count, recomputed=self._recomputed)
        self._opened_seconds[block] += opening
        self._planned_seconds[block] += opening + reserve
        self._pack_blocks.append(block)
        self._pack_sequences.append([])
        self._pack_tokens_left.append(self._pack_tokens)
        self._pack_seconds_left.append(self._most_work_seconds)
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

    def fill(self, sequences: list[int], full_share: float) -> bool:
        """Place all that is left so that tokens and time run out together; False if it does not work out."""
        seconds_left = [self._target_seconds - seconds for seconds in self._block_seconds]
        packs = fill(self._problem, self.degree, seconds_left, self._block_counts, sequences, full_share)
        if packs is None:
            return False
        self._block_seconds = [self._target_seconds - seconds for seconds in seconds_left]
        self._pack_blocks = [block for block, _ in packs]
        self._pack_sequences = [members for _, members in packs]
        return True

    def write_back(self, rank_seconds: list[float], rank_counts: list[int]) -> None:
        """Tell the ranks of every block what it has come to."""
        for block, first in enumerate(self._first_ranks):
            rank_seconds[first : first + self.degree] = [self._block_seconds[block]] * self.degree
            rank_counts[first : first + self.degree] = [self._block_counts[block]] * self.degree

    def micro_batches(self) -> list[MicroBatch]:
        """The packs in the order in which they were opened."""
        return [
            MicroBatch(self._first_ranks[block], self.degree, self._positions(sequences), self._recomputed)
            for block, sequences in zip(self._pack_blocks, self._pack_sequences, strict=True)
        ]

    def _positions(self, sequences: list[int]) -> tuple[int, ...]:
        return tuple(sorted(self._problem.positions[sequences].tolist()))

    def _block_to_open(self, opened: list[float] | NDArray[np.float64], latest: float, open_on: str) -> int | None:
        """The block to open a further pack on, of those that ``opened`` shows to end in time; the first of equals."""
        if isinstance(opened, np.ndarray):
            return self._of_many_blocks(opened, latest, open_on)
        if open_on == "aligned" and latest < math.inf:
            unit = self._aligned_seconds
            waste = [((latest - seconds) % unit if seconds <= latest else math.inf) for seconds in opened]
            least = min(waste)
            return waste.index(least) if least < math.inf else None
        if open_on == "fullest":
            best = max([seconds for seconds in opened if seconds <= latest], default=math.inf)
        else:
            best = min(opened)
        return opened.index(best) if best <= latest and best < math.inf else None

    def _of_many_blocks(self, opened: NDArray[np.float64], latest: float, open_on: str) -> int | None:
        """The same with arrays, for which lists would take too long.

        Where the emptiest block is not what is wanted, only a window of blocks is looked at, and the next one
        when that has nothing left to offer.
        """
        emptiest = int(opened.argmin())
        if opened[emptiest] > latest:
            return None
        if open_on == "emptiest" or latest == math.inf:
            return emptiest
        start = self._window
        while True:
            left = latest - opened[start : start + _WINDOW]
            late = left < 0
            if not late.all():
                break
            start = start + _WINDOW if start + _WINDOW < len(opened) else 0
        self._window = start
        if open_on == "aligned":
            left %= self._aligned_seconds
        left[late] = math.inf
        return start + int(left.argmin())

    def _still_fits(self, pack_index: int) -> int:
        """How many sequences, from the shortest, would still fit into a pack, one at a time."""
        seconds_left = self._target_seconds - self._block_seconds[self._pack_blocks[pack_index]]
        if self.aligned_top_up:
            seconds_left %= self._aligned_seconds
        if seconds_left > self._pack_seconds_left[pack_index]:
            seconds_left = self._pack_seconds_left[pack_index]
        fits = bisect_right(self._tokens, self._pack_tokens_left[pack_index])
        if fits > 0 and self._added_seconds[fits - 1] > seconds_left:
            return bisect_right(self._added_seconds, seconds_left, 0, fits)
        return fits

    def _put(self, sequence: int, pack_index: int) -> None:
        block, added_seconds = self._pack_blocks[pack_index], self._added_seconds[sequence]
        self._pack_sequences[pack_index].append(sequence)
        self._pack_tokens_left[pack_index] -= self._tokens[sequence]
        self._pack_seconds_left[pack_index] -= added_seconds
        self._block_seconds[block] += added_seconds
        self._opened_seconds[block] += added_seconds
        self._planned_seconds[block] += added_seconds
        self._reopen(pack_index)

    def _reopen(self, pack_index: int) -> None:
        fits = self._still_fits(pack_index)
        if fits > 0:
            insort(self._open_packs, (fits, pack_index))
