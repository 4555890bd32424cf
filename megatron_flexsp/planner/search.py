"""Look for the shortest target time that the greedy pass can meet."""

import math
import random
import time

from megatron_flexsp.planner.packing import Rules, pack
from megatron_flexsp.planner.plan import MicroBatch
from megatron_flexsp.planner.problem import Problem

_ANY_TIME_LEFT = 1e9  # overheads, in the rules: top up whatever time is left
_FIXED_RULES = tuple(
    Rules(top_up_below_overheads=overheads, open_on_fullest=fullest)
    for overheads in (1.25, _ANY_TIME_LEFT)
    for fullest in (False, True)
)
_BISECTIONS = 7
_LEAST_GAIN = 2e-3

# A pass places every sequence once, at a few microseconds each; these bound what a search costs by default.
_PLACEMENTS = 40_000
_FEWEST_PASSES, _MOST_PASSES = 5, 64


def search(problem: Problem, bound_seconds: float, deadline: float) -> tuple[MicroBatch, ...]:
    """The best micro-batches that a limited number of greedy passes finds.

    The first pass has no target and always succeeds. Then the target is bisected under each fixed set of
    rules, and the passes that are left try random rules against targets just below the best time. The number
    of passes depends on the problem alone and the random choices are seeded, so the answer is the same in
    every process, unless the deadline cuts the search short.

    Parameters
    ----------
    problem
        The global batch and the degrees that may be used.
    bound_seconds
        No plan is faster; the search stops when it is met.
    deadline
        On ``time.monotonic``'s clock: no pass but the first starts later.
    """
    state = _Search(problem, bound_seconds, deadline)
    for index, rules in enumerate(_FIXED_RULES):
        if index == 0 or (not state.is_over and state.improves((1 - _LEAST_GAIN) * state.best.seconds, rules)):
            _bisect(state, rules)
    _try_random_rules(state)
    return state.best.micro_batches


class _Search:
    """The best packing so far and the passes that are left to better it."""

    def __init__(self, problem: Problem, bound_seconds: float, deadline: float) -> None:
        first = pack(problem, math.inf, Rules())
        assert first is not None, "a pass without a target has room for every sequence"
        self.problem = problem
        self.bound_seconds = bound_seconds
        self.best = first
        self._deadline = deadline
        self._passes_left = max(_FEWEST_PASSES, min(_MOST_PASSES, _PLACEMENTS // len(problem.tokens)))

    @property
    def is_over(self) -> bool:
        """Whether passes or time have run out, or nothing better exists."""
        return (
            self._passes_left == 0
            or time.monotonic() >= self._deadline
            or math.isclose(self.best.seconds, self.bound_seconds, rel_tol=1e-9)
        )

    def improves(self, target_seconds: float, rules: Rules) -> bool:
        """Whether a pass meets the target; keeps what it found where that is the best so far."""
        self._passes_left -= 1
        found = pack(self.problem, target_seconds, rules)
        if found is None:
            return False
        if found.seconds < self.best.seconds:
            self.best = found
        return True


def _bisect(state: _Search, rules: Rules) -> None:
    """Halve the gap between what the rules missed and the best time, again and again."""
    missed_seconds = state.bound_seconds
    for _ in range(_BISECTIONS):
        if state.is_over:
            return
        target_seconds = (missed_seconds + state.best.seconds) / 2
        if not state.improves(target_seconds, rules):
            missed_seconds = target_seconds


def _try_random_rules(state: _Search) -> None:
    """Vary the rules at random, and keep a few of the longer sequences from their narrowest degrees."""
    generator = random.Random(0)
    problem = state.problem
    longer = [index for index, tokens in enumerate(problem.tokens) if tokens > problem.tokens_per_rank / 4]
    while not state.is_over:
        num_widened = min(generator.choice((0, 1, 2, 4, 8)), len(longer))
        widened = generator.sample(longer, num_widened)
        rules = Rules(
            top_up_below_overheads=generator.choice((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, _ANY_TIME_LEFT)),
            open_on_fullest=generator.random() < 0.5,
            least_degrees={sequence: generator.choice(problem.degrees) for sequence in widened},
        )
        gain = generator.choice((5e-4, 2e-3, 5e-3, 1e-2))
        target_seconds = max(state.bound_seconds, (1 - gain) * state.best.seconds)
        state.improves(target_seconds, rules)
