"""Go through all plans of a tiny batch, or as many as there is time for.

Sequences are placed one after another, longest first, in every way that differs: blocks that hold the same are
interchangeable and so are rounds, so states are kept in one canonical order and seen once. A way is left where
what is placed, or all work spread evenly, already takes as long as the best plan known.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_flexsp.planner.blocks import first_ranks, legal_degrees
from megatron_flexsp.planner.plans import MicroBatch
from megatron_flexsp.planner.problem import Problem
from megatron_flexsp.planner.rounds import Group, Round, step_of_rounds

MOST_SEQUENCES = 8
MOST_RANKS = 8
_MOST_STATES = 6_000
_ROUNDING = 1e-12

# Tokens, seconds (overhead and latency counted) and sequences of a micro-batch.
Pack = tuple[int, float, tuple[int, ...]]


@dataclass(frozen=True)
class Exhausted:
    """What a walk through all plans found."""

    best: Any | None
    """The best state that beats the limit, if there is one."""

    is_complete: bool
    """Whether all plans were looked through."""


def is_tiny(problem: Problem) -> bool:
    """Whether going through all plans is worth trying."""
    return len(problem.tokens) <= MOST_SEQUENCES and problem.domain_size <= MOST_RANKS


def best_nested(problem: Problem, limit_seconds: float, deadline: float) -> tuple[tuple[MicroBatch, ...] | None, bool]:
    """The best nested micro-batches, fillers left out, if they beat the limit; and whether all were looked through."""
    tree = _Nested(problem)
    found = tree.walk(limit_seconds, deadline)
    return (None if found.best is None else tree.micro_batches(found.best)), found.is_complete


def best_lockstep(problem: Problem, limit_seconds: float, deadline: float) -> tuple[list[Round] | None, bool]:
    """The best lockstep rounds if they beat the limit; and whether all were looked through."""
    found = _Lockstep(problem).walk(limit_seconds, deadline)
    if found.best is None:
        return None, found.is_complete
    rounds = [tuple(Group(degree, pack[2], recomputed) for degree, pack in groups) for recomputed, groups in found.best]
    return rounds, found.is_complete


class _Walk(ABC):
    """Depth first through partial plans. A state is a tuple in canonical order."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        ranks = problem.domain_size
        self._work = [0.0]
        for index in range(len(problem.tokens)):
            cheapest = min(
                degree * problem.sequence_seconds[degree][index]
                for degree in problem.degrees
                if problem.holds(degree, index)
            )
            self._work.append(self._work[-1] + cheapest / ranks)

    @abstractmethod
    def root(self) -> Any:
        """The state in which nothing is placed."""

    @abstractmethod
    def ways(self, state: Any, sequence: int) -> Iterator[Any]:
        """The states that follow when a sequence is placed."""

    @abstractmethod
    def seconds(self, state: Any) -> float:
        """The step of what is placed, fillers counted; placing more never makes it shorter."""

    @abstractmethod
    def busy_seconds(self, state: Any) -> float:
        """What is placed, spread evenly over the ranks; at most ``seconds``."""

    def walk(self, limit_seconds: float, deadline: float) -> Exhausted:
        """Look for the best complete state that beats the limit."""
        best, best_seconds = None, limit_seconds * (1 - _ROUNDING)
        seen: set[Any] = set()
        stack = [(self.root(), len(self.problem.tokens))]
        while stack:
            state, missing = stack.pop()
            if self._least(state, missing) >= best_seconds:
                continue
            if missing == 0:
                best, best_seconds = state, self.seconds(state) * (1 - _ROUNDING)
                continue
            if len(seen) >= _MOST_STATES or time.monotonic() >= deadline:
                return Exhausted(best, is_complete=False)
            following = [way for way in set(self.ways(state, missing - 1)) if way not in seen]
            seen.update(following)
            ranked = [(self._least(way, missing - 1), way) for way in following]
            ranked.sort(reverse=True)
            stack += [(way, missing - 1) for least, way in ranked if least < best_seconds]
        return Exhausted(best, is_complete=True)

    def _least(self, state: Any, missing: int) -> float:
        return max(self.seconds(state), self.busy_seconds(state) + self._work[missing])

    def _added(
        self, problem: Problem, packs: tuple[Pack, ...], sequence: int, degree: int
    ) -> Iterator[tuple[Pack, ...]]:
        """The packs of one degree with a sequence added to one of them, or to a further one."""
        tokens, seconds = problem.tokens[sequence], problem.sequence_seconds[degree][sequence]
        recomputed = problem.is_recomputed(degree, sequence)
        room = problem.pack_tokens(degree, recomputed=recomputed)
        for index, pack in enumerate(packs):
            if pack[0] + tokens <= room and problem.is_recomputed(degree, pack[2][0]) == recomputed:
                grown = (pack[0] + tokens, pack[1] + seconds, (*pack[2], sequence))
                yield tuple(sorted((*packs[:index], grown, *packs[index + 1 :])))
        opened = self._opened(problem, sequence, degree)
        if opened is not None:
            yield tuple(sorted((*packs, opened)))

    def _opened(self, problem: Problem, sequence: int, degree: int) -> Pack | None:
        """A pack with one sequence, if it can hold it."""
        if not problem.holds(degree, sequence):
            return None
        recomputed = problem.is_recomputed(degree, sequence)
        opening = problem.overhead_seconds + problem.micro_batch_latency(degree, recomputed=recomputed)
        return (problem.tokens[sequence], opening + problem.sequence_seconds[degree][sequence], (sequence,))


class _Nested(_Walk):
    """A state is a block: its degree, the packs on it, and the blocks inside it."""

    def root(self) -> Any:
        domain_size = self.problem.domain_size
        blocks = [
            (first, degree) for degree in legal_degrees(domain_size) for first in first_ranks(degree, domain_size)
        ]

        def inside(first: int, degree: int) -> Any:
            within = [
                (start, width)
                for start, width in blocks
                if width < degree and first <= start and start + width <= first + degree
            ]
            children = [
                block
                for block in within
                if not any(
                    width > block[1] and start <= block[0] and block[0] + block[1] <= start + width
                    for start, width in within
                )
            ]
            return degree, (), tuple(sorted(inside(*child) for child in children))

        return inside(0, domain_size)

    def ways(self, state: Any, sequence: int) -> Iterator[Any]:
        degree, packs, children = state
        if degree in self.problem.degrees:
            for added in self._added(self.problem, packs, sequence, degree):
                yield degree, added, children
        for index, child in enumerate(children):
            if index > 0 and child == children[index - 1]:
                continue
            for grown in self.ways(child, sequence):
                yield degree, packs, tuple(sorted((*children[:index], grown, *children[index + 1 :])))

    def seconds(self, state: Any) -> float:
        return self._path_seconds(state, 0.0, 0.0, 0)

    def busy_seconds(self, state: Any) -> float:
        return self._busy(state) / self.problem.domain_size

    def micro_batches(self, state: Any) -> tuple[MicroBatch, ...]:
        """The packs on blocks, wide ones first, without fillers."""
        items: list[MicroBatch] = []

        def lay_out(block: Any, first: int) -> None:
            degree, packs, children = block
            for _, _, sequences in packs:
                positions = tuple(sorted(self.problem.positions[list(sequences)].tolist()))
                items.append(MicroBatch(first, degree, positions, self.problem.is_recomputed(degree, sequences[0])))
            start = first
            for child in sorted(children, key=lambda child: -child[0]):
                lay_out(child, start)
                start += child[0]

        lay_out(state, 0)
        return tuple(sorted(items, key=lambda item: -item.degree))

    def _path_seconds(self, block: Any, seconds: float, longest: float, count: int) -> float:
        """The step of the slowest rank of a block, given what its ranks run in the blocks around it."""
        _, packs, children = block
        seconds += sum(pack[1] for pack in packs)
        longest = max([longest, *(pack[1] for pack in packs)])
        count += len(packs)
        if children:
            return max(self._path_seconds(child, seconds, longest, count) for child in set(children))
        problem = self.problem
        fillers = -count % problem.count_multiple if count else problem.count_multiple
        if fillers:
            longest = max(longest, problem.overhead_seconds)
        return seconds + fillers * problem.overhead_seconds + (problem.pipeline_stages - 1) * longest

    def _busy(self, block: Any) -> float:
        degree, packs, children = block
        return float(degree * sum(pack[1] for pack in packs)) + sum(self._busy(child) for child in children)


class _Lockstep(_Walk):
    """A state is a row of rounds: whether it is recomputed, and its groups, each its degree and its pack."""

    def root(self) -> Any:
        return ()

    def ways(self, state: Any, sequence: int) -> Iterator[Any]:
        domain_size = self.problem.domain_size
        for index, (recomputed, groups) in enumerate(state):
            problem = self.problem.of(recomputed)
            others = (*state[:index], *state[index + 1 :])
            ranks_left = domain_size - sum(degree for degree, _ in groups)
            for position, (degree, pack) in enumerate(groups):
                rest = (*groups[:position], *groups[position + 1 :])
                for added in self._added(problem, (pack,), sequence, degree):
                    if len(added) == 1:
                        grown = tuple(sorted((*rest, (degree, added[0]))))
                        yield tuple(sorted((*others, (recomputed, grown))))
            for degree in problem.degrees:
                opened = self._opened(problem, sequence, degree)
                if degree <= ranks_left and opened is not None:
                    yield tuple(sorted((*others, (recomputed, tuple(sorted((*groups, (degree, opened))))))))
        for recomputed, problem in enumerate(self.problem.kinds):
            for degree in problem.degrees:
                opened = self._opened(problem, sequence, degree)
                if opened is not None:
                    yield tuple(sorted((*state, (bool(recomputed), ((degree, opened),)))))

    def seconds(self, state: Any) -> float:
        problem = self.problem
        lengths = [max(pack[1] for _, pack in groups) for _, groups in state]
        missing = -len(lengths) % problem.count_multiple if lengths else problem.count_multiple
        return step_of_rounds(problem, lengths + [problem.overhead_seconds] * missing)

    def busy_seconds(self, state: Any) -> float:
        problem = self.problem
        busy = sum(degree * (pack[1] - problem.overhead_seconds) for _, groups in state for degree, pack in groups)
        return float(busy) / problem.domain_size + len(state) * problem.overhead_seconds
