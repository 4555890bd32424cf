"""Find lockstep rounds: how many, how long each, who runs what.

FlexSP (arXiv 2412.01523, section 4) cuts the sorted batch into rounds first and plans each round by itself.
Here rounds are packed together, so that a short sequence can fill any of them: the search is over the rounds'
lengths, from those that the paper's cut suggests; then each round's groups are chosen again by the paper's
program, and real sequences are exchanged between groups.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import replace

from megatron_flexsp.planner.bounds import least_rounds, lockstep_count_bounds
from megatron_flexsp.planner.exchange import exchange
from megatron_flexsp.planner.problem import GAP_WORTH_ANOTHER_SEARCH, Problem, degrees_that_pay
from megatron_flexsp.planner.round_program import blast, plan_round
from megatron_flexsp.planner.rounds import (
    Group,
    Round,
    RoundRules,
    Shape,
    is_recomputed,
    pack_rounds,
    round_seconds,
    rounds_in_a_row,
    step_of_rounds,
)

_RULES = (RoundRules(), RoundRules(widen_most=1 << 30), RoundRules(widen_most=1))
_RATIOS = (1.0, 1.4, 2.2, 5.0)
_COUNTS = 5
_BISECTIONS = 2
"""Of a row of proportions that brought something: which one is best matters more than how far it goes."""

_STRETCHES = (0.7, 0.85, 1.15, 1.3)
_OTHER_COUNT_SHARE = 0.15
"""Of random changes, the share that begins with a round more or less."""
_OTHER_KIND_SHARE = 0.3
"""The share that recomputes one of the rounds, or does so no more."""

_FIRST_COUNTS = 2
"""Counts of rounds to try for the first plan; beyond, no time is spent on packing it well."""
_MANY_ROUNDS = 100
"""Beyond so many, not even that: a pass looks at all groups of all rounds."""

_CLOSE_ENOUGH = 4e-3
_LEAST_GAIN = 0.05

# A pass places every sequence once, at some ten microseconds each; these bound what a search costs by default.
_PLACEMENTS = 56_000
_FEWEST_PASSES, _MOST_PASSES = 8, 160
_ROUND_PROGRAMS = 8
_ROUND_PROGRAM_SEQUENCES = 1024


def search_rounds(
    problem: Problem, bound_seconds: float, deadline: float, seed: int = 0
) -> tuple[list[Round], float, bool]:
    """The best lockstep rounds that a limited number of passes finds.

    Parameters
    ----------
    problem
        The global batch and the degrees that may be used.
    bound_seconds
        No plan is faster; the search stops close to it.
    deadline
        On ``time.monotonic``'s clock: no pass but the first few, which are needed for a legal plan, starts later.
    seed
        Of the random choices.

    Returns
    -------
    Rounds, the longest first; their step; and whether the deadline cut the search short.
    """
    found = _search(problem, bound_seconds, deadline, seed)
    paying = degrees_that_pay(problem)
    is_far = found.seconds > bound_seconds * (1 + GAP_WORTH_ANOTHER_SEARCH)
    if is_far and paying != problem.degrees and not found.is_late:
        # As for nested plans (``search_degrees``): a pass takes the narrowest degree for the cheapest.
        other = _search(replace(problem, degrees=paying), bound_seconds, deadline, seed)
        found = min(other, found, key=lambda state: state.seconds)
    return found.best, found.seconds, found.is_late


def _search(problem: Problem, bound_seconds: float, deadline: float, seed: int) -> "_Search":
    """Rounds with the problem's degrees, all passes made."""
    state = _Search(problem, bound_seconds, deadline)
    for least_seconds, recomputed in sorted(_starts(problem, state.seconds)):
        if least_seconds < state.seconds:
            _try_start(state, recomputed, max(bound_seconds, least_seconds))
    _try_random_lengths(state, seed)
    _choose_groups_again(state, seed)
    if not state.is_over:
        state.offer(exchange(problem, state.best, deadline))
    return state


class _Search:
    """The best rounds so far and the passes that are left to better them."""

    def __init__(self, problem: Problem, bound_seconds: float, deadline: float) -> None:
        self.problem = problem
        self.bound_seconds = bound_seconds
        self.deadline = deadline
        self.passes_left = max(_FEWEST_PASSES, min(_MOST_PASSES, _PLACEMENTS // len(problem.tokens)))
        if problem.recomputing is not None:
            self.passes_left *= 2  # there is as much again to try
        started = time.monotonic()
        self.best = in_order(problem, _first_rounds(problem))
        self._pass_seconds = time.monotonic() - started
        self.seconds = self._price(self.best)

    @property
    def is_over(self) -> bool:
        """Whether time has run out, or nothing much better exists."""
        return self.is_late or self.seconds <= self.bound_seconds * (1 + _CLOSE_ENOUGH)

    @property
    def is_late(self) -> bool:
        """Whether a further pass, if it took as long as the longest so far, would end after the deadline."""
        return time.monotonic() + self._pass_seconds >= self.deadline

    @property
    def has_passes(self) -> bool:
        """Whether a further pass may start."""
        return self.passes_left > 0 and not self.is_over

    def offer(self, rounds: list[Round]) -> float:
        """Keep rounds that are the best so far; returns their step."""
        rounds = in_order(self.problem, rounds)
        seconds = self._price(rounds)
        if seconds < self.seconds:
            self.best, self.seconds = rounds, seconds
        return seconds

    def improves(self, shapes: list[Shape], rules: RoundRules) -> float | None:
        """The step that a pass finds for such rounds, or None if it finds no way."""
        self.passes_left -= 1
        started = time.monotonic()
        rounds = pack_rounds(self.problem, shapes, rules)
        self._pass_seconds = max(self._pass_seconds, time.monotonic() - started)
        return None if rounds is None else self.offer(rounds)

    def shapes(self) -> list[Shape]:
        """The rounds of the best, longest first."""
        found = [Shape(round_seconds(self.problem, groups), is_recomputed(groups)) for groups in self.best]
        return sorted(found, key=lambda shape: -shape.seconds)

    def _price(self, rounds: list[Round]) -> float:
        return step_of_rounds(self.problem, [round_seconds(self.problem, groups) for groups in rounds])


def _first_rounds(problem: Problem) -> list[Round]:
    """Some legal rounds, quickly: lengths are doubled, and a few rounds added, until the greedy pass succeeds.

    They are recomputed only if the longest sequence must be.
    """
    overall, recomputed = problem, _needs_recomputing(problem)
    problem = problem.of(recomputed)
    count = least_rounds(problem)
    per_round = (problem.seconds_arrays[problem.degrees[-1]].sum() * problem.degrees[-1]) / problem.domain_size / count
    longest = min(
        problem.latency_seconds[degree] + problem.sequence_seconds[degree][-1]
        for degree in problem.degrees
        if problem.tokens[-1] <= problem.pack_tokens(degree)
    )
    length = max(per_round, longest, 1e-9)
    for _ in range(_FIRST_COUNTS if count <= _MANY_ROUNDS else 0):
        for doublings in range(4):
            shapes = [Shape(problem.overhead_seconds + length * (1 << doublings), recomputed)] * count
            rounds = pack_rounds(overall, shapes, RoundRules(widen_most=1 << 30))
            if rounds is not None:
                return rounds
        count += max(1, count // 4 // problem.count_multiple) * problem.count_multiple
    return rounds_in_a_row(overall, recomputed=recomputed)


def _needs_recomputing(problem: Problem) -> bool:
    """Whether no group keeps the longest sequence's activations."""
    return problem.tokens[-1] > problem.pack_tokens(problem.degrees[-1])


def _starts(problem: Problem, limit_seconds: float) -> Iterator[tuple[float, list[bool]]]:
    """How many rounds there may be, and which of them are recomputed, longest first: none, the longest, or all.

    Each with what it takes at least, so far as such a bound is known. Those that take more than the limit are left out.
    """

    def counts(of: Problem) -> Iterator[tuple[int, float]]:
        yield from lockstep_count_bounds(of, least_rounds(of), _COUNTS, limit_seconds).items()

    for count, least_seconds in counts(problem):
        if not _needs_recomputing(problem):
            yield least_seconds, [False] * count
        if problem.recomputing is not None:
            yield least_seconds, [True] + [False] * (count - 1)
    if problem.recomputing is not None:
        for count, least_seconds in counts(problem.recomputing):
            yield least_seconds, [True] * count


def _try_start(state: _Search, recomputed: list[bool], least_seconds: float) -> None:
    """Try such rounds in several proportions of their lengths, and bisect the step a little where that helps."""
    problem = state.problem
    for proportions in _proportions(problem, len(recomputed)):
        gap = state.seconds - least_seconds
        if not state.has_passes or gap <= 0:
            return
        target = least_seconds + (1 - _LEAST_GAIN) * gap
        if state.improves(_scaled(problem, proportions, recomputed, target), _RULES[0]):
            _bisect(state, proportions, recomputed, least_seconds)


def _bisect(state: _Search, proportions: list[float], recomputed: list[bool], missed_seconds: float) -> None:
    """Halve the gap between what was missed and the best step, a few times."""
    for _ in range(_BISECTIONS):
        if not state.has_passes or state.seconds - missed_seconds <= _CLOSE_ENOUGH * state.bound_seconds:
            return
        target = (missed_seconds + state.seconds) / 2
        if state.improves(_scaled(state.problem, proportions, recomputed, target), _RULES[0]) is None:
            missed_seconds = target


def _proportions(problem: Problem, count: int) -> Iterator[list[float]]:
    """How the rounds' lengths, without their overhead, may relate: in fixed ratios, and as the paper cuts them."""
    for ratio in _RATIOS if count > 1 else (1.0,):
        yield [ratio ** (1 - index / max(1, count - 1)) for index in range(count)]
    if count > 1:
        widest = problem.sequence_seconds[problem.degrees[-1]]
        chunks = blast(problem.tokens, count)
        sums = sorted((sum(widest[chunk.start : chunk.stop]) for chunk in chunks), reverse=True)
        if len(sums) == count and sums[-1] > 0:
            yield sums


def _scaled(problem: Problem, proportions: list[float], recomputed: list[bool], step: float) -> list[Shape]:
    """Rounds in these proportions that make up the step, overheads and the pipeline counted."""
    stages = problem.pipeline_stages - 1
    overheads = problem.overhead_seconds * (len(proportions) + stages)
    share = max(0.0, step - overheads) / (sum(proportions) + stages * max(proportions))
    return [
        Shape(problem.overhead_seconds + share * proportion, is_recomputed)
        for proportion, is_recomputed in zip(proportions, recomputed, strict=True)
    ]


def _try_random_lengths(state: _Search, seed: int) -> None:
    """Shorten or stretch one, two or all of the best rounds at random, and now and then add or leave one out."""
    generator = random.Random(seed)
    problem = state.problem
    fewest = least_rounds(problem.recomputing or problem)
    while state.has_passes:
        shapes = state.shapes()
        rest = [max(shape.seconds - problem.overhead_seconds, 1e-12) for shape in shapes]
        recomputed = [shape.recomputed for shape in shapes]
        if generator.random() < _OTHER_COUNT_SHARE:
            if len(rest) - problem.count_multiple >= fewest and generator.random() < 0.5:
                rest, recomputed = rest[: -problem.count_multiple], recomputed[: -problem.count_multiple]
            else:
                rest += [generator.choice(rest) for _ in range(problem.count_multiple)]
                recomputed += [False] * problem.count_multiple
        changed = generator.sample(range(len(rest)), min(generator.choice((1, 2, len(rest))), len(rest)))
        for index in changed:
            rest[index] *= generator.choice(_STRETCHES)
        if problem.recomputing is not None and generator.random() < _OTHER_KIND_SHARE:
            other = generator.randrange(len(rest))
            recomputed[other] = not recomputed[other]
        gap = state.seconds - state.bound_seconds
        target = state.bound_seconds + generator.choice((0.9, 0.95, 0.98, 0.99)) * gap
        state.improves(_scaled(problem, rest, recomputed, target), generator.choice(_RULES))


def _choose_groups_again(state: _Search, seed: int) -> None:
    """Plan each round of the best again by the program of the paper, and keep what is better."""
    problem = state.problem
    for index in range(min(len(state.best), _ROUND_PROGRAMS)):
        groups = state.best[index]
        sequences = sorted(sequence for group in groups for sequence in group.sequences)
        if state.is_over or not 1 < len(sequences) <= _ROUND_PROGRAM_SEQUENCES:
            continue
        recomputed = is_recomputed(groups)
        known = tuple(replace(group, recomputed=False) for group in groups)
        better = plan_round(problem.of(recomputed), sequences, known, state.deadline - time.monotonic(), seed)
        if better is not None:
            better = tuple(Group(group.degree, group.sequences, recomputed) for group in better)
            state.offer([better if number == index else kept for number, kept in enumerate(state.best)])


def in_order(problem: Problem, rounds: list[Round]) -> list[Round]:
    """The rounds that hold sequences, longest first, and fillers up to a whole number of the pipeline's multiple."""
    kept = sorted((groups for groups in rounds if groups), key=lambda groups: -round_seconds(problem, groups))
    empty: Round = ()
    return kept + [empty] * (-len(kept) % problem.count_multiple)
