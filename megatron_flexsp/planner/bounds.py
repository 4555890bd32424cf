"""What no plan can beat. A bound tells how good a plan is without knowing the best one."""

import math

import numpy as np

from megatron_flexsp.planner.problem import Problem

# Sums of many seconds round; the bound gives up this share so that rounding cannot lift it above a plan.
_ROUNDING_SHARE = 1e-10


def lower_bound_seconds(problem: Problem) -> float:
    """A lower bound on the step of every legal plan with the problem's degrees, whatever its schedule.

    It is the larger of two bounds.

    *Work.* A micro-batch of degree d that holds tokens p keeps d ranks busy: it takes at least d x overhead
    and the rank-seconds of its sequences, each at least its cheapest over the degrees that hold it. With C
    the tokens per rank, p <= d C, so the ranks' counts of micro-batches add up to at least sum(s) / C; each
    count is also at least 1 and a multiple of ``count_multiple``, so the sum is one too. All that is spread
    over N ranks, and the step ends no sooner than the mean of the ranks' busy times. Waiting, for members of
    a group or for a lockstep round, only adds to it.

    *Longest sequence.* Some rank runs the micro-batch that holds it, at one of the degrees that can hold it,
    and runs at least ``count_multiple`` micro-batches, each with its overhead.

    A static plan keeps to one degree: give a problem with that degree alone.
    """
    return max(_work_bound(problem), _longest_sequence_bound(problem)) * (1 - _ROUNDING_SHARE)


def _work_bound(problem: Problem) -> float:
    tokens = np.array(problem.tokens)
    cheapest = np.full(len(tokens), np.inf)
    for degree in problem.degrees:
        holds = tokens <= problem.pack_tokens(degree)
        rank_seconds = degree * np.array(problem.sequence_seconds[degree])
        cheapest[holds] = np.minimum(cheapest, rank_seconds)[holds]
    full_slices = math.ceil(int(tokens.sum()) / problem.tokens_per_rank)
    groups_of_slices = max(problem.domain_size, math.ceil(full_slices / problem.count_multiple))
    overheads = groups_of_slices * problem.count_multiple * problem.overhead_seconds
    return float((overheads + cheapest.sum()) / problem.domain_size)


def _longest_sequence_bound(problem: Problem) -> float:
    return min(
        problem.opening_seconds(degree, count=0) + problem.sequence_seconds[degree][-1]
        for degree in problem.degrees
        if problem.tokens[-1] <= problem.pack_tokens(degree)
    )
