"""Fill the blocks of the narrowest degree with all that is left, so that both their tokens and their time run out.

A block that runs n packs has n x capacity tokens of room, and the time that its overheads leave. A sequence
takes both, in proportion while it is short; a long one takes more time for its tokens, because attention grows
with the square. So each block first gets as many packs as its share of the tokens needs; what time would be
left if those were filled with short sequences is its *allowance* for long ones. Sequences are then placed,
longest first, on the block with the greatest allowance that has room, each into the fullest of its packs that
fits (the first rule is LPT, Graham 1969, the second best-fit decreasing). Short ones come last and fill up.
"""

from bisect import bisect_right
from heapq import heapify, heappop, heappush

import numpy as np

from megatron_flexsp.planner.problem import Problem


def fill(
    problem: Problem,
    degree: int,
    seconds_left: list[float],
    counts: list[int],
    sequences: list[int],
    full_share: float,
) -> list[tuple[int, list[int]]] | None:
    """Place all sequences on the blocks of one degree.

    Parameters
    ----------
    problem
        The global batch.
    degree
        The blocks' degree.
    seconds_left
        Seconds that each block has left, finite, shape (blocks,).
    counts
        Micro-batches that each block's ranks run already, shape (blocks,).
    sequences
        What is to be placed, longest first.
    full_share
        How full packs are expected to get; decides how many packs each block starts with.

    Returns
    -------
    Packs, each as its block and its sequences; or None where the greedy placement ran out of room or time.
    """
    if not sequences:
        return []
    blocks = _Blocks(problem, degree, seconds_left, counts)
    if not blocks.allot_packs(sequences, full_share):
        return None
    return blocks.packs if blocks.place_all(sequences) else None


class _Blocks:
    """The blocks of one degree, their room and their time."""

    def __init__(self, problem: Problem, degree: int, seconds_left: list[float], counts: list[int]) -> None:
        self.packs: list[tuple[int, list[int]]] = []
        self._problem = problem
        self._degree = degree
        self._tokens = problem.tokens
        self._seconds = problem.sequence_seconds[degree]
        self._pack_tokens = problem.pack_tokens(degree)
        self._seconds_left = seconds_left
        self._counts = counts
        self._unopened: list[int] = []
        self._allowances: list[float] = []
        self._rate = 0.0
        # For each block its open packs, as tokens left and the pack's number.
        self._open: list[list[tuple[int, int]]] = [[] for _ in seconds_left]
        self._most_room = [0] * len(seconds_left)

    def allot_packs(self, sequences: list[int], full_share: float) -> bool:
        """Decide how many packs each block gets; False if no numbers of packs leave the time for the work.

        Each block gets the most packs that it could fill with short sequences in time. Where the tokens need
        more, those blocks get one more whose tokens gain most by it: such a block must do without long ones.
        """
        multiple, overhead = self._problem.count_multiple, self._problem.overhead_seconds
        latency = self._problem.latency_seconds[self._degree]
        needed_tokens = float(sum(self._tokens[index] for index in sequences))
        needed_seconds = sum(self._seconds[index] for index in sequences)
        shortest = sequences[-1]
        self._rate = rate = max(self._seconds[shortest] / self._tokens[shortest], 1e-30)

        paid = (-np.array(self._counts)) % multiple  # their overheads are paid: fillers would take their places
        left = np.array(self._seconds_left) - paid * latency
        turn_seconds = multiple * (overhead + latency)
        pack_seconds = rate * self._pack_tokens
        turns = np.floor((left - paid * pack_seconds) / (turn_seconds + multiple * pack_seconds))
        turns = np.clip(turns, 0, len(sequences))

        def room(turns: np.ndarray) -> np.ndarray:
            in_time = (left - turns * turn_seconds) / rate
            return np.clip(np.minimum((paid + turns * multiple) * self._pack_tokens, in_time), 0, None)

        tokens = room(turns)
        missing = needed_tokens / full_share - tokens.sum()
        if missing > 0:
            gains = room(turns + 1) - tokens
            best = np.argsort(-gains, kind="stable")
            best = best[gains[best] > 0]
            enough = np.searchsorted(np.cumsum(gains[best]), missing) + 1
            turns[best[:enough]] += 1
            tokens = room(turns)
        spare = left - turns * turn_seconds
        if tokens.sum() < needed_tokens or spare[tokens > 0].sum() < needed_seconds:
            return False
        self._allowances = (spare - rate * tokens * (needed_tokens / tokens.sum())).tolist()
        self._unopened = (paid + turns * multiple).astype(int).tolist()
        return True

    def place_all(self, sequences: list[int]) -> bool:
        """Place the sequences, longest first; False if one finds neither room nor time."""
        tokens, seconds, rate = self._tokens, self._seconds, self._rate
        ready = [(-allowance, block) for block, allowance in enumerate(self._allowances)]
        heapify(ready)
        waiting: list[tuple[int, int, float]] = []  # blocks without room, by how many sequences would fit
        for sequence in sequences:
            while waiting and -waiting[0][0] > sequence:
                _, block, allowance = heappop(waiting)
                heappush(ready, (allowance, block))
            while ready:
                allowance, block = heappop(ready)
                if self._place(sequence, block):
                    beyond = seconds[sequence] - rate * tokens[sequence]
                    heappush(ready, (allowance + beyond, block))
                    break
                fits = self._fits(block)
                if fits > 0:
                    heappush(waiting, (-fits, block, allowance))
            else:
                another = self._block_for_another_pack(sequence)
                if another is None:
                    return False
                self._unopened[another] += 1
                self._place(sequence, another)
        return True

    def _place(self, sequence: int, block: int) -> bool:
        """Put a sequence into the fullest pack of a block that has room, or into a new one."""
        tokens, seconds = self._tokens[sequence], self._seconds[sequence]
        if tokens <= self._most_room[block] and seconds <= self._seconds_left[block]:
            packs = self._open[block]
            best = (
                0
                if len(packs) == 1
                else min(
                    (index for index, pack in enumerate(packs) if pack[0] >= tokens), key=lambda index: packs[index][0]
                )
            )
            room, number = packs[best]
            packs[best] = (room - tokens, number)
            self.packs[number][1].append(sequence)
        else:
            if not self._unopened[block] or tokens > self._pack_tokens:
                return False
            opening = self._problem.opening_seconds(self._degree, self._counts[block])
            if opening + seconds > self._seconds_left[block]:
                return False
            self._seconds_left[block] -= opening
            self._counts[block] += 1
            self._unopened[block] -= 1
            self._open[block].append((self._pack_tokens - tokens, len(self.packs)))
            self.packs.append((block, [sequence]))
        self._seconds_left[block] -= seconds
        self._most_room[block] = max(self._open[block])[0]
        return True

    def _fits(self, block: int) -> int:
        """How many sequences, from the shortest, the block could take, one at a time."""
        left = self._seconds_left[block]
        fits = min(bisect_right(self._tokens, self._most_room[block]), bisect_right(self._seconds, left))
        if self._unopened[block]:
            left -= self._problem.opening_seconds(self._degree, self._counts[block])
            in_new = min(bisect_right(self._tokens, self._pack_tokens), bisect_right(self._seconds, left))
            fits = max(fits, in_new)
        return fits

    def _block_for_another_pack(self, sequence: int) -> int | None:
        """The block with the most time left, if that is enough for a further pack with this sequence."""
        if self._tokens[sequence] > self._pack_tokens:
            return None
        left = self._seconds_left
        block = max(range(len(left)), key=left.__getitem__)
        needed = self._problem.opening_seconds(self._degree, self._counts[block]) + self._seconds[sequence]
        return block if needed <= left[block] else None
