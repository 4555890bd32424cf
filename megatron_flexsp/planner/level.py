"""The blocks of one degree while packs are opened on them and filled."""

import math
from bisect import bisect_left, bisect_right, insort
from operator import neg

import numpy as np
from numpy.typing import NDArray

from megatron_flexsp.planner.blocks import first_ranks
from megatron_flexsp.planner.filling import fill
from megatron_flexsp.planner.plans import MicroBatch
from megatron_flexsp.planner.problem import Problem

_MANY_BLOCKS = 128
_WINDOW = 256


class Level:
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

    def place(self, sequences: list[int], open_on: str, reserve_share: float) -> bool:
        """Put each sequence into a pack, opening some; False if one finds no place. How: ``packing.Rules``."""
        return all(self.add(sequence) or self._open(sequence, open_on, reserve_share) for sequence in sequences)

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

    def _open(self, sequence: int, open_on: str, reserve_share: float) -> bool:
        """Open a pack for a sequence; False if no block has the time."""
        reserve = reserve_share * self._rate * (self._pack_tokens - self._problem.tokens[sequence])
        # With a pipeline, the longest micro-batch counts once more for each further stage.
        excess_seconds = max(0.0, self._added_seconds[sequence] - self._most_work_seconds)
        filling_seconds = (self._problem.pipeline_stages - 1) * excess_seconds
        latest = self._target_seconds - self._added_seconds[sequence] - filling_seconds
        block = None
        if reserve > 0:
            block = self._block_to_open(self._planned_seconds, latest - reserve, open_on)
        if block is None:
            block = self._block_to_open(self._opened_seconds, latest, open_on)
        if block is None:
            return False
        self._opened_seconds[block] += filling_seconds
        self._planned_seconds[block] += filling_seconds
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
