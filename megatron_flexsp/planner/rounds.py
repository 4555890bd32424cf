"""Pack all sequences into lockstep rounds of given lengths, if that works out.

In a round every rank is in exactly one micro-batch, so the micro-batches of a round are bins that share the
domain's ranks: a bin of degree d takes d of them, holds d x capacity tokens, and must end when its round ends.
Blocks need no thought here: powers of two, laid out from the widest to the narrowest, are always aligned.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_flexsp.planner.plans import MicroBatch
from megatron_flexsp.planner.problem import Problem

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Group:
    """One micro-batch of a round."""

    degree: int
    """Ranks that run it."""

    sequences: tuple[int, ...]
    """Numbers of its sequences in the problem; none for a filler."""

    recomputed: bool = False
    """Whether activations are recomputed; all groups of a round do so, or none."""


Round = tuple[Group, ...]


@dataclass(frozen=True)
class RoundRules:
    """The choice that a greedy pass leaves open."""

    widen_most: int = 8
    """Put a sequence into an open group of up to so many times its own degree before opening a further group."""


def group_seconds(problem: Problem, group: Group) -> float:
    """How long a group takes, overhead and latency counted."""
    problem = problem.of(group.recomputed)
    latency = problem.latency_seconds[group.degree] if group.sequences else 0.0
    seconds = problem.sequence_seconds.get(group.degree, [])
    return problem.overhead_seconds + latency + sum(seconds[index] for index in group.sequences)


def round_seconds(problem: Problem, groups: Round) -> float:
    """How long a round takes: as long as its slowest group."""
    return max((group_seconds(problem, group) for group in groups), default=problem.overhead_seconds)


def step_of_rounds(problem: Problem, lengths: list[float]) -> float:
    """The step's time: rounds follow one another; each further pipeline stage waits once for the longest."""
    return sum(lengths) + (problem.pipeline_stages - 1) * max(lengths)


def is_recomputed(groups: Round) -> bool:
    """Whether a round is."""
    return any(group.recomputed for group in groups)


@dataclass(frozen=True)
class Shape:
    """What a round is to become."""

    seconds: float
    """Its length, overhead counted."""

    recomputed: bool = False


def pack_rounds(problem: Problem, shapes: Sequence[Shape], rules: RoundRules) -> list[Round] | None:
    """Look for rounds that take no longer than the given ones and hold all sequences.

    Longest first, each sequence goes into the tightest open group that has the tokens and the time, narrow
    groups before wide ones; where none has, into a new group of the narrowest degree that can take it, in the
    round that it costs the fewest rank-seconds.

    Parameters
    ----------
    problem
        The global batch.
    shapes
        Seconds of each round, and whether it is recomputed.
    rules
        The choice to make on the way.

    Returns
    -------
    As many rounds, or None where the greedy pass found no way.
    """
    return _Rounds(problem, shapes, rules).pack()


class _Rounds:
    """Rounds being filled. The open groups are rows of arrays, so that all are looked at together."""

    def __init__(self, problem: Problem, shapes: Sequence[Shape], rules: RoundRules) -> None:
        self._problem, self._shapes, self._rules = problem, shapes, rules
        # By whether a round is recomputed; that kind's columns stand behind the other's.
        self._kinds = problem.kinds
        self._longest = max(shape.seconds for shape in shapes)
        most = min(len(problem.tokens), len(shapes) * (problem.domain_size // problem.degrees[0]))
        self._count = 0
        self._tokens_left = np.zeros(most, dtype=np.int64)
        self._seconds_left = np.zeros(most)
        self._columns = np.zeros(most, dtype=np.int64)
        self._degrees = np.zeros(most, dtype=np.int64)
        self._narrow_first = np.zeros(most)
        self._members: list[list[int]] = []
        self._round_of: list[int] = []
        self._ranks_left = [problem.domain_size] * len(shapes)
        rows = [kind.seconds_arrays[degree] for kind in self._kinds for degree in problem.degrees]
        self._seconds_of = np.stack(rows, axis=1)
        # How many sequences, from the shortest, an empty group of each degree can take in each round.
        self._admitted = [
            [
                min(
                    bisect_right(problem.tokens, self._kinds[shape.recomputed].pack_tokens(degree)),
                    bisect_right(self._kinds[shape.recomputed].sequence_seconds[degree], self._purse(degree, shape)),
                )
                for degree in problem.degrees
            ]
            for shape in shapes
        ]

    def pack(self) -> list[Round] | None:
        """Place every sequence, longest first."""
        tokens = self._problem.tokens
        for sequence in range(len(tokens) - 1, -1, -1):
            widest = None
            if self._rules.widen_most < self._problem.degrees[-1]:
                index, where = self._opening(sequence)
                if where >= 0:
                    widest = self._problem.degrees[index] * self._rules.widen_most
            group = self._best_open(sequence, widest)
            if group < 0:
                index, where = self._opening(sequence)
                if where < 0:
                    return None
                group = self._open(index, where)
            self._members[group].append(sequence)
            self._tokens_left[group] -= tokens[sequence]
            self._seconds_left[group] -= self._seconds_of[sequence, self._columns[group]]
        rounds: list[list[Group]] = [[] for _ in self._shapes]
        for group, members in enumerate(self._members):
            number = self._round_of[group]
            rounds[number].append(Group(int(self._degrees[group]), tuple(members), self._shapes[number].recomputed))
        return [tuple(groups) for groups in rounds]

    def _purse(self, degree: int, shape: Shape) -> float:
        latency = self._kinds[shape.recomputed].latency_seconds[degree]
        return shape.seconds - self._problem.overhead_seconds - latency

    def _best_open(self, sequence: int, widest: int | None) -> int:
        """The open group to add a sequence to, or -1."""
        count = self._count
        if count == 0:
            return -1
        left = self._seconds_left[:count] - self._seconds_of[sequence][self._columns[:count]]
        unfit = left < 0
        unfit |= self._tokens_left[:count] < self._problem.tokens[sequence]
        if widest is not None:
            unfit |= self._degrees[:count] > widest
        keys = left + self._narrow_first[:count]
        keys[unfit] = np.inf
        best = int(keys.argmin())
        return -1 if unfit[best] else best

    def _opening(self, sequence: int) -> tuple[int, int]:
        """Degree (as an index) and round of the cheapest new group for a sequence; round -1 if there is none."""
        best, answer = float("inf"), (0, -1)
        for number, admitted in enumerate(self._admitted):
            seconds = self._kinds[self._shapes[number].recomputed].sequence_seconds
            for index, degree in enumerate(self._problem.degrees):
                if degree > self._ranks_left[number]:
                    break
                if sequence < admitted[index]:
                    cost = degree * seconds[degree][sequence]
                    # Equal cost: the round with the most ranks left for it.
                    if (cost, -self._ranks_left[number]) < (best, -self._ranks_left[answer[1]]):
                        best, answer = cost, (index, number)
                    break
        return answer

    def _open(self, index: int, number: int) -> int:
        degree, group, shape = self._problem.degrees[index], self._count, self._shapes[number]
        self._count += 1
        self._tokens_left[group] = self._kinds[shape.recomputed].pack_tokens(degree)
        self._seconds_left[group] = self._purse(degree, shape)
        self._columns[group] = index + len(self._problem.degrees) * shape.recomputed
        self._degrees[group] = degree
        self._narrow_first[group] = index * 2.0 * self._longest
        self._members.append([])
        self._round_of.append(number)
        self._ranks_left[number] -= degree
        return group


def micro_batches_of(problem: Problem, rounds: list[Round]) -> tuple[MicroBatch, ...]:
    """The rounds on aligned blocks, widest groups first, with fillers on the ranks that are left."""
    items: list[MicroBatch] = []
    for groups in rounds:
        first, recomputed = 0, is_recomputed(groups)
        for group in sorted(groups, key=lambda group: -group.degree):
            positions = sorted(problem.positions[list(group.sequences)].tolist())
            items.append(MicroBatch(first, group.degree, tuple(positions), recomputed))
            first += group.degree
        items += [MicroBatch(rank, 1, (), recomputed) for rank in range(first, problem.domain_size)]
    return tuple(items)
