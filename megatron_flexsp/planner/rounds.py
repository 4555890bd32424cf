"""Pack all sequences into lockstep rounds of given lengths, if that works out.

In a round every rank is in exactly one micro-batch, so the micro-batches of a round are bins that share the
domain's ranks: a bin of degree d takes d of them, holds d x capacity tokens, and must end when its round ends.
Blocks need no thought here: powers of two, laid out from the widest to the narrowest, are always aligned.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

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


def rounds_in_a_row(problem: Problem, *, recomputed: bool) -> list[Round]:
    """Legal rounds in one go: longest first, each sequence joins the one before it or opens the next group.

    Groups have the narrowest degree that holds their sequences, which must all fit in groups of that kind.
    """
    kind = problem.of(recomputed)
    rounds: list[list[tuple[int, list[int]]]] = []
    degree_index, ranks_left, tokens_left = len(kind.degrees) - 1, 0, 0
    for sequence in range(len(kind.tokens) - 1, -1, -1):
        tokens, degree = kind.tokens[sequence], kind.degrees[degree_index]
        while degree_index > 0 and tokens <= kind.pack_tokens(kind.degrees[degree_index - 1]):
            degree_index -= 1
        if kind.degrees[degree_index] < degree or tokens > tokens_left:
            degree = kind.degrees[degree_index]
            if degree > ranks_left:
                rounds.append([])
                ranks_left = kind.domain_size
            rounds[-1].append((degree, []))
            ranks_left, tokens_left = ranks_left - degree, kind.pack_tokens(degree)
        rounds[-1][-1][1].append(sequence)
        tokens_left -= tokens
    return [tuple(Group(degree, tuple(members), recomputed) for degree, members in groups) for groups in rounds]


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
        rows = [kind.seconds_arrays[degree] for kind in self._kinds for degree in problem.degrees]
        self._seconds_of = np.stack(rows, axis=1)
        self._openings = _Openings(problem, shapes)

    def pack(self) -> list[Round] | None:
        """Place every sequence, longest first."""
        tokens = self._problem.tokens
        for sequence in range(len(tokens) - 1, -1, -1):
            opening = widest = None
            if self._rules.widen_most < self._problem.degrees[-1]:
                opening = self._openings.cheapest(sequence)
                if opening is not None:
                    widest = self._problem.degrees[opening[0]] * self._rules.widen_most
            group = self._best_open(sequence, widest)
            if group < 0:
                opening = opening or self._openings.cheapest(sequence)
                if opening is None:
                    return None
                group = self._open(*opening)
            self._members[group].append(sequence)
            self._tokens_left[group] -= tokens[sequence]
            self._seconds_left[group] -= self._seconds_of[sequence, self._columns[group]]
        rounds: list[list[Group]] = [[] for _ in self._shapes]
        for group, members in enumerate(self._members):
            number = self._round_of[group]
            rounds[number].append(Group(int(self._degrees[group]), tuple(members), self._shapes[number].recomputed))
        return [tuple(groups) for groups in rounds]

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

    def _open(self, index: int, number: int) -> int:
        degree, group, shape = self._problem.degrees[index], self._count, self._shapes[number]
        self._count += 1
        self._tokens_left[group] = self._kinds[shape.recomputed].pack_tokens(degree)
        self._seconds_left[group] = _work_seconds(self._kinds[shape.recomputed], degree, shape)
        self._columns[group] = index + len(self._problem.degrees) * shape.recomputed
        self._degrees[group] = degree
        self._narrow_first[group] = index * 2.0 * self._longest
        self._members.append([])
        self._round_of.append(number)
        self._openings.take(number, degree)
        return group


class _Openings:
    """Where a further group may be opened, for ever shorter sequences.

    In each round a group is opened on the narrowest degree that could take the sequence, if it has the ranks left. That
    degree becomes narrower as sequences become shorter. So rounds wait in one heap for each degree, move on to those of
    narrower ones, and of each heap only the round with the most ranks left needs to be looked at.
    """

    def __init__(self, problem: Problem, shapes: Sequence[Shape]) -> None:
        self._problem, self._shapes = problem, shapes
        self._ranks_left = [problem.domain_size] * len(shapes)
        self._narrowest = [len(problem.degrees)] * len(shapes)
        self._waiting: dict[tuple[bool, int], list[tuple[int, int]]] = {}
        # How many sequences, from the shortest, each round can take on each degree; what comes first stands last.
        self._coming = sorted(
            (_fitting(problem.of(shape.recomputed), degree, shape), index, number)
            for number, shape in enumerate(shapes)
            for index, degree in enumerate(problem.degrees)
        )

    def cheapest(self, sequence: int) -> tuple[int, int] | None:
        """Degree (as an index) and round of the group that costs the fewest rank-seconds; None if there is none.

        Of equal cost is the round with the most ranks left, and then the first.
        """
        while self._coming and self._coming[-1][0] > sequence:
            _, index, number = self._coming.pop()
            if index < self._narrowest[number]:
                self._narrowest[number] = index
                self._wait(number)
        best = (math.inf, 0, 0, 0)
        for (recomputed, index), waiting in self._waiting.items():
            while waiting and not self._is_up_to_date(*waiting[0], index):
                heappop(waiting)
            degree = self._problem.degrees[index]
            if waiting and degree <= -waiting[0][0]:
                seconds = self._problem.of(recomputed).sequence_seconds[degree][sequence]
                best = min(best, (degree * seconds, *waiting[0], index))
        return None if best[0] == math.inf else (best[3], best[2])

    def take(self, number: int, ranks: int) -> None:
        """Take ranks from a round."""
        self._ranks_left[number] -= ranks
        self._wait(number)

    def _is_up_to_date(self, negative_ranks: int, number: int, index: int) -> bool:
        """Whether a round still has so many ranks and has not moved on to a narrower degree."""
        return self._ranks_left[number] == -negative_ranks and self._narrowest[number] == index

    def _wait(self, number: int) -> None:
        key = (self._shapes[number].recomputed, self._narrowest[number])
        heappush(self._waiting.setdefault(key, []), (-self._ranks_left[number], number))


def _fitting(kind: Problem, degree: int, shape: Shape) -> int:
    """How many sequences, from the shortest, an empty group can take, one at a time."""
    in_time = bisect_right(kind.sequence_seconds[degree], _work_seconds(kind, degree, shape))
    return min(bisect_right(kind.tokens, kind.pack_tokens(degree)), in_time)


def _work_seconds(kind: Problem, degree: int, shape: Shape) -> float:
    """What a group has for its sequences."""
    return shape.seconds - kind.overhead_seconds - kind.latency_seconds[degree]


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
