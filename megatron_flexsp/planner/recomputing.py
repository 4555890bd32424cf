"""Which sequences to recompute, and where: on fewer ranks than could hold their activations.

A wide group pays for its exchanges; a narrow one that recomputes pays for a second forward. Whichever takes fewer
rank-seconds is chosen for each sequence, before anything is packed.
"""

import numpy as np
from numpy.typing import NDArray

from megatron_flexsp.planner.problem import Problem

Floats = NDArray[np.float64]


def degrees_of_recomputed(
    problem: Problem, target_seconds: float, most_seconds: float, price: float
) -> dict[int, int] | None:
    """The sequences to recompute and the degree of each; None where one has no place within the target.

    Parameters
    ----------
    problem
        The global batch.
    target_seconds
        When the last rank must have ended.
    most_seconds
        What one micro-batch may take.
    price
        Weight of a recomputed sequence's rank-seconds against those of keeping its activations.
    """
    if problem.recomputed_tokens_per_rank is None:
        return {}
    first = int(np.searchsorted(problem.tokens_array, problem.pack_tokens(problem.degrees[0]), side="right"))
    tokens = problem.tokens_array[first:]
    if not tokens.size:
        return {}
    kept_costs, recomputed_costs = np.full((2, len(problem.degrees), tokens.size), np.inf)
    for row, degree in enumerate(problem.degrees):
        seconds = problem.seconds_arrays[degree][first:]
        for recomputed, costs in ((False, kept_costs), (True, recomputed_costs)):
            room = problem.pack_tokens(degree, recomputed=recomputed)
            opening = problem.overhead_seconds + problem.micro_batch_latency(degree, recomputed=recomputed)
            # A sequence pays for the part of its micro-batch that it fills.
            cost = degree * (seconds + opening * tokens / room)
            in_time = (problem.opening_seconds(degree, 0, recomputed=recomputed) + seconds <= target_seconds) & (
                opening + seconds <= most_seconds
            )
            is_so = (tokens > problem.pack_tokens(degree)) == recomputed
            costs[row] = np.where(is_so & (tokens <= room) & in_time, cost, np.inf)
    cheapest_kept, cheapest_recomputed = kept_costs.min(axis=0), recomputed_costs.min(axis=0)
    best = recomputed_costs.argmin(axis=0)
    is_needed = np.isinf(cheapest_kept)
    if (is_needed & np.isinf(cheapest_recomputed)).any():
        return None
    pays = is_needed
    if price < np.inf:
        pays = pays | (cheapest_recomputed * price < cheapest_kept)
    return {first + int(index): problem.degrees[best[index]] for index in np.flatnonzero(pays)}
