"""Look for the shortest target time that the greedy pass can meet."""

import math
import random
import time
from dataclasses import replace

from megatron_flexsp.planner.bounds import simple_bound_seconds
from megatron_flexsp.planner.packing import ANY_TIME_LEFT, Packing, Rules, pack
from megatron_flexsp.planner.pipeline_rules import PipelineRules, pipeline_rules
from megatron_flexsp.planner.problem import GAP_WORTH_ANOTHER_SEARCH, Problem, degrees_that_pay

_FIXED_RULES = (
    # For mixtures of a few huge sequences and many short ones: wide blocks keep time for whole packs of short ones.
    Rules(open_on="aligned", reserve_share=0.95, top_up_below_overheads=ANY_TIME_LEFT, top_up_at_any_price=False),
    # The same where huge sequences are so many that blocks had better be filled one by one: code repositories.
    Rules(open_on="fullest", reserve_share=0.95, top_up_below_overheads=ANY_TIME_LEFT, top_up_at_any_price=False),
    # Where most sequences are a fair part of a pack and narrow packs won't get full: documents of middling length.
    Rules(full_share=0.95, top_up_below_overheads=ANY_TIME_LEFT, top_up_to_alignment=True, top_up_at_any_price=False),
    # For mostly short documents: wide micro-batches are topped up only where their ranks have no time for another one.
    Rules(top_up_below_overheads=1.25),
    # For few ranks: wide micro-batches take all that they can, since a further one's overhead weighs much.
    Rules(top_up_below_overheads=ANY_TIME_LEFT),
    # For cheap overheads and middling lengths: between the first and the one above.
    Rules(open_on="aligned", reserve_share=0.8, top_up_below_overheads=ANY_TIME_LEFT),
)
"""Each is the best for some data: leaving one out made plans of that sort 0.1 to 1.2 % longer on average."""

_CLOSE_ENOUGH = 4e-3
"""A share of the bound within which no further pass is worth its time."""

_GAP_WORTH_EACH_DEGREE = 0.1
"""A plan that lies further above its bound, as a share of the bound, is worth a search with each degree alone."""

_GAINED_BY_A_SEARCH = 0.03
"""What a search mostly takes off its first pass. A degree is searched alone if a pass comes so near to the best."""

_RECOMPUTING_PRICES = (0.9, 1.0, 1.0, 1.0, 1.1, 1.3, math.inf)

_LEAST_GAIN = 0.05
"""The share of the gap that a set of rules must close at once to be tried further."""

# A pass places every sequence once, at a few microseconds each; these bound what a search costs by default.
_PLACEMENTS = 30_000
_FEWEST_PASSES, _MOST_PASSES = 6, 20
_MOST_PIPELINE_PASSES = 40

_RANDOM_EVEN_COUNTS = (0.9, 1.0, 1.0, 1.1)
"""What to multiply the count by that pipeline rules plan for, in random ones."""

_RANDOM_PIPELINE_RULES = 4
"""Random rules keep to so many of the most promising."""

_HOPED_FOR_GAP = 0.03
"""Passes are dear for large batches, so the first target is what a good set of rules usually meets."""


def search(problem: Problem, bound_seconds: float, deadline: float, seed: int = 0) -> tuple[Packing, bool]:
    """The best nested micro-batches that a limited number of greedy passes finds.

    The first pass has no target and always succeeds. Then the target is bisected under each fixed set of
    rules, and the passes that are left try random rules against targets below the best time. The number
    of passes depends on the problem alone and the random choices are seeded, so the answer is the same in
    every process, unless the deadline cuts the search short.

    Parameters
    ----------
    problem
        The global batch and the degrees that may be used.
    bound_seconds
        No plan is faster; the search stops close to it.
    deadline
        On ``time.monotonic``'s clock: no pass but the first starts later.
    seed
        Of the random choices.

    Returns
    -------
    The best packing, and whether the deadline cut the search short.
    """
    state = _Search(problem, bound_seconds, deadline)
    limits = pipeline_rules(problem) if problem.pipeline_stages > 1 else []
    for number, (promised_seconds, rules) in enumerate(_fixed_rules(problem, bound_seconds, limits)):
        if state.is_over:
            break
        target = promised_seconds + (1 - _LEAST_GAIN) * (state.best.seconds - promised_seconds)
        hoped_for = (1 + _HOPED_FOR_GAP) * promised_seconds
        if number == 0 and hoped_for < target:
            _bisect(state, rules, promised_seconds if state.improves(hoped_for, rules) else hoped_for)
        elif promised_seconds < target and state.improves(target, rules):
            _bisect(state, rules, promised_seconds)
    _try_random_rules(state, seed, limits[:_RANDOM_PIPELINE_RULES])
    return state.best, state.is_cut_short


def _fixed_rules(problem: Problem, bound_seconds: float, limits: list[PipelineRules]) -> list[tuple[float, Rules]]:
    """What to try first, each with a step that passes hardly better; ``limits`` are those of a pipeline."""
    fixed = [(bound_seconds, rules) for rules in _FIXED_RULES]
    if limits:
        fixed = [
            (max(bound_seconds, found.promised_seconds), rules)
            for found in limits
            for rules in found.for_passes(problem)
        ]
    if problem.recomputed_tokens_per_rank is None:
        return fixed
    return [(least, replace(rules, recomputing_price=price)) for least, rules in fixed for price in (1.0, math.inf)]


def search_degrees(problem: Problem, bound_seconds: float, deadline: float, seed: int = 0) -> tuple[Packing, bool]:
    """What ``search`` finds, and what it finds with some of the degrees left out where that may be better.

    A pass takes the narrowest degree that holds a sequence for the cheapest, as it is where wider groups exchange more.
    Where latencies or bandwidths say otherwise, it finds better plans without the degrees that are dearer than wider
    ones. Where most tokens need wide groups, one degree for all packs more evenly.
    """
    best, is_cut_short = search(problem, bound_seconds, deadline, seed)
    for degrees in (degrees_that_pay(problem), *((degree,) for degree in problem.degrees)):
        alone = replace(problem, degrees=degrees)
        if is_cut_short or time.monotonic() >= deadline or degrees == problem.degrees:
            continue
        if alone.holds(degrees[-1], -1) and _may_be_better(alone, best.seconds, bound_seconds):
            found, is_cut_short = search(alone, bound_seconds, deadline, seed)
            best = min(best, found, key=lambda packing: packing.seconds)
    return best, is_cut_short


def _may_be_better(problem: Problem, best_seconds: float, bound_seconds: float) -> bool:
    """Whether a search with a problem's few degrees is worth its time: one pass comes near, or the best is far off."""
    if best_seconds <= bound_seconds * (1 + _CLOSE_ENOUGH) or best_seconds <= simple_bound_seconds(problem):
        return False
    if problem.pipeline_stages > 1 and best_seconds <= pipeline_rules(problem)[0].promised_seconds:
        return False
    if len(problem.degrees) > 1:
        return best_seconds > bound_seconds * (1 + GAP_WORTH_ANOTHER_SEARCH)
    if best_seconds > bound_seconds * (1 + _GAP_WORTH_EACH_DEGREE):
        return True
    return pack(problem, best_seconds * (1 + _GAINED_BY_A_SEARCH), Rules()) is not None


class _Search:
    """The best packing so far and the passes that are left to better it."""

    def __init__(self, problem: Problem, bound_seconds: float, deadline: float) -> None:
        started = time.monotonic()
        first = pack(problem, math.inf, Rules())
        assert first is not None, "a pass without a target has room for every sequence"
        self.problem = problem
        self.bound_seconds = bound_seconds
        self.best = first
        self._deadline = deadline
        self._pass_seconds = time.monotonic() - started
        most_passes = _MOST_PASSES if problem.pipeline_stages == 1 else _MOST_PIPELINE_PASSES
        self._passes_left = min(most_passes, _FEWEST_PASSES + _PLACEMENTS // len(problem.tokens))

    @property
    def is_over(self) -> bool:
        """Whether passes or time have run out, or nothing much better exists."""
        return self._is_finished or self._is_late

    @property
    def is_cut_short(self) -> bool:
        """Whether the deadline kept passes from being made."""
        return not self._is_finished and self._is_late

    @property
    def _is_finished(self) -> bool:
        return self._passes_left == 0 or self.best.seconds <= self.bound_seconds * (1 + _CLOSE_ENOUGH)

    @property
    def _is_late(self) -> bool:
        """Whether a further pass, if it took as long as the longest so far, would end after the deadline."""
        return time.monotonic() + self._pass_seconds >= self._deadline

    def target(self, share: float) -> float:
        """A time between the bound (share 0) and the best so far (share 1)."""
        return self.bound_seconds + share * (self.best.seconds - self.bound_seconds)

    def improves(self, target_seconds: float, rules: Rules) -> bool:
        """Whether a pass meets the target; keeps what it found where that is the best so far."""
        self._passes_left -= 1
        started = time.monotonic()
        found = pack(self.problem, target_seconds, rules)
        self._pass_seconds = max(self._pass_seconds, time.monotonic() - started)
        if found is None:
            return False
        if found.seconds < self.best.seconds:
            self.best = found
        return True


def _bisect(state: _Search, rules: Rules, missed_seconds: float) -> None:
    """Halve the gap between what the rules missed and the best time, until it is small."""
    while not state.is_over and state.best.seconds - missed_seconds > _CLOSE_ENOUGH * state.bound_seconds:
        target_seconds = (missed_seconds + state.best.seconds) / 2
        if not state.improves(target_seconds, rules):
            missed_seconds = target_seconds


def _try_random_rules(state: _Search, seed: int, promising: list[PipelineRules]) -> None:
    """Vary the rules at random, and keep a few of the longer sequences from their narrowest degrees."""
    generator = random.Random(seed)
    problem = state.problem
    longer = [index for index, tokens in enumerate(problem.tokens) if tokens > problem.tokens_per_rank / 4]
    while not state.is_over:
        num_widened = min(generator.choice((0, 0, 1, 2, 4, 8)), len(longer))
        widened = generator.sample(longer, num_widened)
        rules = Rules(
            reserve_share=generator.choice((0.0, 0.6, 0.8, 0.9, 0.95, 1.0)),
            full_share=generator.choice((0.0, 0.0, 0.0, 0.93, 0.95, 0.97)),
            top_up_below_overheads=generator.choice((0.0, 0.5, 1.25, 2.0, 3.0, ANY_TIME_LEFT)),
            open_on=generator.choice(("emptiest", "fullest", "aligned")),
            top_up_to_alignment=generator.random() < 0.5,
            top_up_at_any_price=generator.random() < 0.5,
            least_degrees={sequence: generator.choice(problem.degrees) for sequence in widened},
        )
        if promising:
            limits = generator.choice(promising)
            even_count = limits.even_count * generator.choice(_RANDOM_EVEN_COUNTS)
            rules = replace(rules, even_count=even_count, most_seconds=limits.most_seconds)
        if problem.recomputed_tokens_per_rank is not None:
            rules = replace(rules, recomputing_price=generator.choice(_RECOMPUTING_PRICES))
        state.improves(state.target(generator.choice((0.75, 0.85, 0.92, 0.97))), rules)
