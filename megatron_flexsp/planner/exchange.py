"""Shorten lockstep rounds by moving and exchanging real sequences between groups."""

import time

import numpy as np

from megatron_flexsp.planner.problem import Problem
from megatron_flexsp.planner.rounds import Group, Round

_MOST_STEPS = 200
_MOST_PAIRS = 1 << 17
"""Of sequences to exchange, for one group."""
_MOST_PAIRS_IN_ALL = 1 << 24
"""Several times what a batch of some thousands needs, unless it makes hundreds of rounds."""


def exchange(problem: Problem, rounds: list[Round], deadline: float) -> list[Round]:
    """Rounds that take no longer, and where it works out less.

    Again and again, the slowest group of some round hands a sequence over to another group, or exchanges one
    for a shorter one, so that it ends earlier and no round becomes longer. Steepest first.
    """
    state = _Loads(problem, rounds)
    for _ in range(_MOST_STEPS):
        if not any(state.relieve(group) for group in state.slowest_groups() if time.monotonic() < deadline):
            break
    return state.rounds()


class _Loads:
    """Who runs what, as arrays over sequences and over groups."""

    def __init__(self, problem: Problem, rounds: list[Round]) -> None:
        self._problem = problem
        self._pairs_left = _MOST_PAIRS_IN_ALL
        self._degrees = [group.degree for groups in rounds for group in groups]
        self._round_of = np.array([number for number, groups in enumerate(rounds) for _ in groups], dtype=np.int64)
        self._num_rounds = len(rounds)
        self._recomputed = [group.recomputed for groups in rounds for group in groups]
        kinds = [problem.of(recomputed) for recomputed in self._recomputed]
        places = [problem.degrees.index(degree) for degree in self._degrees]
        self._index = np.array(places) + len(problem.degrees) * np.array(self._recomputed)
        self._group_of = np.zeros(len(problem.tokens), dtype=np.int64)
        for number, group in enumerate(group for groups in rounds for group in groups):
            self._group_of[list(group.sequences)] = number
        self._tokens = problem.tokens_array
        self._seconds = np.stack([kind.seconds_arrays[degree] for kind in problem.kinds for degree in problem.degrees])
        own = self._seconds[self._index[self._group_of], np.arange(len(problem.tokens))]
        latencies = np.array([kind.latency_seconds[degree] for kind, degree in zip(kinds, self._degrees, strict=True)])
        self._ends = latencies + np.bincount(self._group_of, weights=own, minlength=len(self._degrees))
        held = np.bincount(self._group_of, weights=self._tokens, minlength=len(self._degrees))
        room = [kind.pack_tokens(degree) for kind, degree in zip(kinds, self._degrees, strict=True)]
        self._room = np.array(room) - held.astype(np.int64)

    def slowest_groups(self) -> list[int]:
        """The slowest group of each round that has any."""
        # By round, then by when they end; of those that end together, the first comes last.
        in_order = np.lexsort((-np.arange(len(self._ends)), self._ends, self._round_of))
        is_last = np.append(np.diff(self._round_of[in_order]) > 0, True)
        return in_order[is_last].tolist()

    def relieve(self, group: int) -> bool:
        """Shorten a group that ends last in its round, without lengthening a round; False if nothing does."""
        mine = np.flatnonzero(self._group_of == group)
        self._pairs_left -= len(mine) * (len(self._degrees) + len(self._tokens))
        if self._pairs_left < 0:
            return False
        lengths = np.zeros(self._num_rounds)
        np.maximum.at(lengths, self._round_of, self._ends)
        limits = lengths[self._round_of]
        least = 1e-9 * limits[group]
        limits[self._round_of == self._round_of[group]] -= least
        return self._hand_over(group, mine, limits) or self._swap(group, mine, limits, least)

    def rounds(self) -> list[Round]:
        """What the groups run now."""
        rounds: list[list[Group]] = [[] for _ in range(self._num_rounds)]
        order = np.argsort(self._group_of, kind="stable")
        starts = np.searchsorted(self._group_of[order], np.arange(len(self._degrees) + 1))
        for number, degree in enumerate(self._degrees):
            members = order[starts[number] : starts[number + 1]].tolist()
            if members:
                rounds[self._round_of[number]].append(Group(degree, tuple(members), self._recomputed[number]))
        return [tuple(groups) for groups in rounds]

    def _hand_over(self, group: int, mine: np.ndarray, limits: np.ndarray) -> bool:
        """Move the sequence that relieves the group most to a group that can take it."""
        ends = self._ends + self._seconds[self._index, mine[:, None]]
        able = (ends <= limits) & (self._tokens[mine][:, None] <= self._room)
        able[:, group] = False
        if not able.any():
            return False
        relief = np.where(able.any(axis=1), self._seconds[self._index[group], mine], -1.0)
        row = int(relief.argmax())
        if relief[row] <= 0:
            return False
        other = int(np.where(able[row], ends[row], np.inf).argmin())
        self._move(int(mine[row]), other)
        return True

    def _swap(self, group: int, mine: np.ndarray, limits: np.ndarray, least: float) -> bool:
        """Exchange a sequence of the group for a shorter one, so that the later of the two groups ends earliest."""
        if len(mine) * len(self._tokens) > _MOST_PAIRS:
            return False
        theirs = self._group_of
        here, there = self._index[group], self._index[theirs]
        others = np.arange(len(theirs))
        my_end = self._ends[group] - self._seconds[here, mine][:, None] + self._seconds[here]
        their_end = self._ends[theirs] - self._seconds[there, others] + self._seconds[there, mine[:, None]]
        gained = self._tokens[mine][:, None] - self._tokens
        able = (theirs != group) & (their_end <= limits[theirs]) & (my_end <= self._ends[group] - least)
        able &= (gained <= self._room[theirs]) & (-gained <= self._room[group])
        if not able.any():
            return False
        scores = np.where(
            able, np.maximum(my_end, np.where(self._round_of[theirs] == self._round_of[group], their_end, 0)), np.inf
        )
        row, column = np.unravel_index(int(scores.argmin()), scores.shape)
        other = int(theirs[column])
        self._move(int(column), group)
        self._move(int(mine[row]), other)
        return True

    def _move(self, sequence: int, group: int) -> None:
        before = int(self._group_of[sequence])
        self._group_of[sequence] = group
        tokens = self._tokens[sequence]
        self._room[before] += tokens
        self._room[group] -= tokens
        self._ends[before] -= self._seconds[self._index[before], sequence]
        self._ends[group] += self._seconds[self._index[group], sequence]
