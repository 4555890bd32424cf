"""What no plan can beat. A bound tells how good a plan is without knowing the best one.

Here are those that count work and those of lockstep plans; ``nested_bound`` has the one of nested plans.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from megatron_flexsp.planner.classes import Classes, make_classes
from megatron_flexsp.planner.problem import Problem

# Sums of many seconds round; the bound gives up this share so that rounding cannot lift it above a plan.
ROUNDING_SHARE = 1e-10

MOST_CLASSES = 128
_COUNTING_SECONDS = 0.05
_BISECTIONS = 9
_SETTLED_SHARE = 1e-3
"""What the lockstep bound gives up, so that it need not try every number of rounds."""


def lockstep_bound_seconds(problem: Problem, deadline: float = math.inf) -> float:
    """A lower bound on the step of every legal lockstep plan with the problem's degrees.

    In lockstep all ranks run the same number n of micro-batches, so n C N tokens must hold the batch. Take a
    plan of n rounds and T seconds. Each round lasts at least its overhead, so a sequence can only run at a
    degree that holds it and for which n x overhead + latency + seconds <= T. Ranks are busy for no more than
    N T rank-seconds, of which n N overheads and at least the cheapest such degree of every sequence. The
    least T that meets this, for the best n, is the bound.

    Where rounds may be recomputed, a sequence takes no less than where it is kept, if a group can keep it, and slots
    hold no more than the capacity of the recomputed: that is what is counted then.

    With p pipeline stages, the longest round counts p times. It is no shorter than the mean round, so T is at
    least f(n) = 1 + (p - 1) / n times the rounds' sum; and a sequence's own round counts p times, or a longer one.

    Further rounds cost more, but for f: if n rounds take at least T, m > n of them take at least T f(m) / f(n). So
    numbers of rounds are settled together where f hardly differs, and all that are left where it hardly exceeds 1.
    """
    if problem.recomputed_tokens_per_rank is not None:
        capacity = problem.recomputed_tokens_per_rank
        problem = replace(problem, tokens_per_rank=capacity, recomputed_tokens_per_rank=None)
    simple, further_stages = simple_bound_seconds(problem), problem.pipeline_stages - 1
    if deadline - time.monotonic() < _COUNTING_SECONDS:
        return simple * (1 - ROUNDING_SHARE)
    classes = make_classes(problem, MOST_CLASSES)
    count, least, without_fill = least_rounds(problem), math.inf, 0.0
    while without_fill < (1 - _SETTLED_SHARE) * least and simple < least:
        seconds = _least_lockstep(classes, count, simple)
        settled = int(_SETTLED_SHARE * count * (1 + count / max(further_stages, 1)))
        last = count + settled // problem.count_multiple * problem.count_multiple
        without_fill = seconds / (1 + further_stages / count)
        least = min(least, without_fill * (1 + further_stages / last))
        count = last + problem.count_multiple
    return max(simple, min(least, without_fill)) * (1 - ROUNDING_SHARE)


def lockstep_count_bounds(problem: Problem, fewest: int, how_many: int, limit: float) -> dict[int, float]:
    """For numbers of rounds from ``fewest`` on, a lower bound on the step of plans with so many.

    Stops after ``how_many`` numbers, or where the overheads alone exceed the limit or the best bound so far.
    """
    classes = make_classes(problem, MOST_CLASSES)
    floor, stages = simple_bound_seconds(problem), problem.pipeline_stages
    bounds: dict[int, float] = {}
    for turn in range(how_many):
        count = fewest + turn * problem.count_multiple
        best = min(limit, min(bounds.values(), default=math.inf))
        if bounds and (count + stages - 1) * problem.overhead_seconds >= best:
            break
        bounds[count] = _least_lockstep(classes, count, floor)
    return bounds


def least_rounds(problem: Problem) -> int:
    """The fewest lockstep rounds whose ranks hold all tokens, as the pipeline's multiple allows."""
    per_round = problem.tokens_per_rank * problem.domain_size
    return max(1, math.ceil(sum(problem.tokens) / per_round / problem.count_multiple)) * problem.count_multiple


def simple_bound_seconds(problem: Problem) -> float:
    """A lower bound on the step of every legal plan with the problem's degrees, whatever its schedule.

    It is the larger of two bounds.

    *Work.* A micro-batch of degree d that holds tokens p keeps d ranks busy: it takes at least d x overhead
    and the rank-seconds of its sequences, each at least its cheapest over the degrees that hold it. With C
    the tokens per rank, p <= d C, so the ranks' counts of micro-batches add up to at least sum(s) / C; each
    count is also at least 1 and a multiple of ``count_multiple``, so the sum is one too. (C is the capacity of the
    recomputed for the sequences that the narrowest degree would recompute.) All that is spread
    over N ranks, and the step ends no sooner than the mean of the ranks' busy times. Waiting, for members of
    a group or for a lockstep round, only adds to it.

    *Longest sequence.* Some rank runs the micro-batch that holds it, at one of the degrees that can hold it,
    and runs at least ``count_multiple`` micro-batches, each with its overhead.

    With a pipeline, a rank's micro-batches take no longer than without, and the longest one counts once more
    for each further stage.

    A static plan keeps to one degree: give a problem with that degree alone. Plans that recompute every micro-batch
    have a problem of their own (``Problem.recomputing``).
    """
    return max(_work_bound(problem), _longest_sequence_bound(problem))


def _work_bound(problem: Problem) -> float:
    classes = make_classes(problem, MOST_CLASSES)
    busy = np.where(classes.holds, classes.busy, np.inf).min(axis=0)
    full_slices = math.ceil(float(classes.full_slots[0].sum()) * (1 - ROUNDING_SHARE))
    groups_of_slices = max(problem.domain_size, math.ceil(full_slices / problem.count_multiple))
    overheads = groups_of_slices * problem.count_multiple * problem.overhead_seconds
    return float((overheads + busy.sum()) / problem.domain_size)


def _longest_sequence_bound(problem: Problem) -> float:
    own = problem.pipeline_stages - 1  # with a pipeline, its micro-batch or a longer one counts so often more
    return min(
        problem.opening_seconds(degree, 0, recomputed=(recomputed := problem.is_recomputed(degree, -1)))
        + own * (problem.overhead_seconds + problem.micro_batch_latency(degree, recomputed=recomputed))
        + (1 + own) * problem.sequence_seconds[degree][-1]
        for degree in problem.degrees
        if problem.holds(degree, -1)
    )


def _least_lockstep(classes: Classes, count: int, floor: float) -> float:
    """The least step, at least ``floor``, that ``count`` rounds could take for all that the bound knows."""
    problem, stages = classes.problem, classes.problem.pipeline_stages
    overheads = count * problem.overhead_seconds
    needed = (count - 1) * problem.overhead_seconds + stages * (problem.overhead_seconds + classes.seconds)
    fill_and_drain = 1 + (stages - 1) / count

    def is_impossible(step: float) -> bool:
        fits = classes.holds & (needed <= step)
        busy = np.where(fits, classes.busy, np.inf).min(axis=0)
        return bool((overheads + busy.sum() / problem.domain_size) * fill_and_drain > step)

    low = floor
    while is_impossible(high := 1.05 * low):
        low = high
    return bisect(is_impossible, low, high) if is_impossible(low) else low


def bisect(is_impossible: Callable[[float], bool], low: float, high: float) -> float:
    """An impossible step close below the least one that is not; ``low`` is impossible, ``high`` is not."""
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if is_impossible(middle):
            low = middle
        else:
            high = middle
    return low
