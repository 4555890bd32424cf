"""Pack all sequences into nested micro-batches so that no rank passes a target time, if that works out.

A greedy pass in the manner of multifit bin packing (Coffman, Garey and Johnson, 1978), from the widest degree
to the narrowest. Because degrees never increase, all ranks of a block have the same history when its degree's
turn comes, so one number, the seconds so far, describes it. Each sequence goes to the narrowest degree that
holds it within capacity and target; then what a wide micro-batch has left over is topped up with shorter
sequences, which spares its ranks a further micro-batch's overhead. Where recomputing on few ranks is cheaper than many
ranks, or needed, it goes to a recomputed micro-batch instead.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import neg

import numpy as np

from megatron_flexsp.planner.level import Level
from megatron_flexsp.planner.plans import MicroBatch
from megatron_flexsp.planner.problem import Problem, topping_up_pays
from megatron_flexsp.planner.recomputing import degrees_of_recomputed

ANY_TIME_LEFT = 1e9
"""Overheads, in the rules: top up whatever time is left."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The choices that a greedy pass leaves open; which are best differs from batch to batch."""

    top_up_below_overheads: float = 1.25
    """Top a wide micro-batch up if its ranks have less time left than so many micro-batch overheads."""

    open_on: str = "emptiest"
    """The block that a micro-batch opens on: the ``emptiest``, the ``fullest`` that still meets the target, or
    the best ``aligned``, where the time that is left suits a whole number of full narrow packs best."""

    reserve_share: float = 0.0
    """When a wide micro-batch is opened, count so much of its room as filled already: topping up will fill it."""

    top_up_at_any_price: bool = True
    """Top up also where a token's exchange costs more than its share of a further narrow micro-batch."""

    top_up_to_alignment: bool = False
    """Top up only until the time that is left would hold a full narrow pack less."""

    full_share: float = 0.0
    """How full the narrowest packs are expected to get; 0 places sequences on them as on all others."""

    even_count: float = 4
    """With a pipeline: plan for ranks that run so many micro-batches, none longer than if all were equal."""

    most_seconds: float = math.inf
    """With a pipeline: nor longer than this. What a single sequence takes longer, its ranks have less for others."""

    least_degrees: Mapping[int, int] = field(default_factory=dict)
    """Degrees below which single sequences must not go, unless they are recomputed."""

    recomputing_price: float = 1.0
    """Choose as if recomputing took so many times the rank-seconds that it takes; with infinity, only where a sequence
    fits in no other way."""


@dataclass(frozen=True)
class Packing:
    """What a pass found."""

    seconds: float
    """When the last rank has ended."""

    levels: Sequence[Level]
    """The packs of each degree, widest first; those that are recomputed before the others."""

    fillers: Sequence[MicroBatch]
    """What brings every rank's count to what it must be."""

    @cached_property
    def micro_batches(self) -> tuple[MicroBatch, ...]:
        """In execution order, fillers included. Of many passes only the best is asked for them."""
        return (*(item for level in self.levels for item in level.micro_batches()), *self.fillers)


def pack(problem: Problem, target_seconds: float, rules: Rules) -> Packing | None:
    """Look for nested micro-batches whose ranks all end within the target.

    Parameters
    ----------
    problem
        The global batch.
    target_seconds
        When the last rank must have ended. With infinity the pass always succeeds.
    rules
        The choices to make on the way.

    Returns
    -------
    The packing, or None where the greedy pass found no way to meet the target.
    """
    most_seconds = math.inf
    if problem.pipeline_stages > 1 and target_seconds < math.inf:
        even_seconds = target_seconds / (rules.even_count + problem.pipeline_stages - 1)
        most_seconds = min(rules.most_seconds, even_seconds)
        target_seconds -= (problem.pipeline_stages - 1) * most_seconds
    rank_seconds = [0.0] * problem.domain_size
    rank_counts = [0] * problem.domain_size
    admitted = {degree: _admitted(problem, degree, target_seconds, most_seconds) for degree in problem.degrees}
    recomputed = degrees_of_recomputed(problem, target_seconds, most_seconds, rules.recomputing_price)
    if recomputed is None:
        return None
    waiting = [sequence for sequence in range(len(problem.tokens) - 1, -1, -1) if sequence not in recomputed]
    levels: list[Level] = []
    for index in range(len(problem.degrees) - 1, -1, -1):
        degree = problem.degrees[index]
        fit_narrower = max((admitted[narrower] for narrower in problem.degrees[:index]), default=0)
        if degree in recomputed.values():
            level = Level(problem, degree, target_seconds, most_seconds, rank_seconds, rank_counts, recomputed=True)
            levels.append(level)
            longest_first = sorted((each for each, home in recomputed.items() if home == degree), reverse=True)
            if not level.place(longest_first, rules.open_on, reserve_share=0.0):  # they are not topped up
                return None
            level.write_back(rank_seconds, rank_counts)
        level = Level(problem, degree, target_seconds, most_seconds, rank_seconds, rank_counts)
        levels.append(level)
        if index == 0:
            if level.is_hopeless(waiting):
                return None
            if rules.full_share and target_seconds < math.inf and most_seconds == math.inf:
                if not level.fill(waiting, rules.full_share):
                    return None
                level.write_back(rank_seconds, rank_counts)
                break
        must, may = _split(waiting, fit_narrower, level.degree, rules.least_degrees)
        if not level.place(must, rules.open_on, rules.reserve_share):
            return None
        level.close_blocks_with_time_for(rules.top_up_below_overheads * problem.overhead_seconds)
        level.aligned_top_up = rules.top_up_to_alignment
        waiting = level.top_up(may) if rules.top_up_at_any_price or topping_up_pays(problem, level.degree) else may
        level.write_back(rank_seconds, rank_counts)
    fillers_alone_seconds = problem.count_multiple * problem.overhead_seconds
    packing = Packing(max(*rank_seconds, fillers_alone_seconds), levels, _fillers(rank_counts, problem.count_multiple))
    if problem.pipeline_stages > 1:
        return replace(packing, seconds=path_seconds(problem, packing.micro_batches))
    return packing


def path_seconds(problem: Problem, micro_batches: Sequence[MicroBatch]) -> float:
    """The step of nested micro-batches, fillers among them, with the pipeline's fill and drain (``step_seconds``)."""
    numbers = np.empty(len(problem.tokens), dtype=np.int64)
    numbers[problem.positions] = np.arange(len(problem.tokens))
    seconds, longest = np.zeros(problem.domain_size), np.zeros(problem.domain_size)
    for item in micro_batches:
        taken = problem.overhead_seconds
        if not item.is_filler:
            work = problem.seconds_arrays[item.degree][numbers[list(item.sequences)]]
            taken += problem.micro_batch_latency(item.degree, recomputed=item.recomputed) + float(work.sum())
        ranks = slice(item.first_rank, item.first_rank + item.degree)
        seconds[ranks] += taken
        longest[ranks] = np.maximum(longest[ranks], taken)
    return float((seconds + (problem.pipeline_stages - 1) * longest).max())


def _admitted(problem: Problem, degree: int, target_seconds: float, most_seconds: float) -> int:
    """How many sequences, from the shortest, an idle block of this degree can take, one at a time."""
    seconds_left = min(
        target_seconds - problem.opening_seconds(degree, count=0),
        most_seconds - problem.overhead_seconds - problem.latency_seconds[degree],
    )
    return min(
        bisect_right(problem.tokens, problem.pack_tokens(degree)),
        bisect_right(problem.sequence_seconds[degree], seconds_left),
    )


def _split(
    waiting: list[int], fit_narrower: int, degree: int, least_degrees: Mapping[int, int]
) -> tuple[list[int], list[int]]:
    """Split what waits, longest first: what must go to this degree and what may go to a narrower one."""
    cut = bisect_right(waiting, -fit_narrower, key=neg)
    must, may = waiting[:cut], waiting[cut:]
    widened = {sequence for sequence, least_degree in least_degrees.items() if least_degree >= degree}
    if widened:
        must += [sequence for sequence in may if sequence in widened]
        may = [sequence for sequence in may if sequence not in widened]
    return must, may


def with_fillers(problem: Problem, micro_batches: Sequence[MicroBatch]) -> tuple[MicroBatch, ...]:
    """The micro-batches, and the fillers that bring every rank's count to what it must be."""
    counts = [0] * problem.domain_size
    for item in micro_batches:
        for rank in item.ranks:
            counts[rank] += 1
    return (*micro_batches, *_fillers(counts, problem.count_multiple))


def _fillers(rank_counts: Iterable[int], count_multiple: int) -> list[MicroBatch]:
    """What brings every rank to at least one micro-batch and to a multiple of ``count_multiple``."""
    return [
        MicroBatch(rank, 1, ())
        for rank, count in enumerate(rank_counts)
        for _ in range(max(count_multiple, math.ceil(count / count_multiple) * count_multiple) - count)
    ]
