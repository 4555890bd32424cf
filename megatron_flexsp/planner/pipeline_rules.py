"""What to try with a pipeline: how long a micro-batch may be, so that the step is as short as it can be.

With p stages a rank's longest micro-batch counts p times. More micro-batches are shorter ones, which fill and drain the
pipeline sooner, but each costs its overhead. Where one sequence takes longer than all that, the other micro-batches may
as well take as long.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_flexsp.planner.packing import ANY_TIME_LEFT, Rules
from megatron_flexsp.planner.problem import Problem

_FINEST_STEP = 8
"""Counts of micro-batches are all tried up to twice this one, and beyond it in steps of this share of them."""

_ROUNDING_SHARE = 1e-9
"""What a micro-batch's limit is raised by, so that the sequence that it is taken from keeps to it."""


@dataclass(frozen=True, order=True)
class PipelineRules:
    """Limits on micro-batches, and what may be hoped for from them."""

    promised_seconds: float
    """The step if the work could be cut and shared out at will, which passes seldom better."""

    even_count: float
    """As in ``Rules``."""

    most_seconds: float
    """As in ``Rules``."""

    def for_passes(self, problem: Problem) -> Iterator[Rules]:
        """With what else a pass must know."""
        for overheads in (1.25, ANY_TIME_LEFT) if len(problem.degrees) > 1 else (0.0,):
            yield Rules(top_up_below_overheads=overheads, even_count=self.even_count, most_seconds=self.most_seconds)


def pipeline_rules(problem: Problem) -> list[PipelineRules]:
    """What to try for a problem with a pipeline, what promises the shortest step first."""
    return sorted([*_of_equal_micro_batches(problem), *_as_long_as_the_longest(problem)])


def _of_equal_micro_batches(problem: Problem) -> Iterator[PipelineRules]:
    """No micro-batch longer than if each rank ran so many equal ones, but for a sequence that is longer by itself."""
    widest, work_seconds, fewest = problem.degrees[-1], _work_seconds(problem), _fewest_micro_batches(problem)
    longest_seconds = _alone_seconds(problem, widest)
    count = 1
    while count <= len(problem.tokens):
        sum_seconds = work_seconds + max(count, fewest) * _opening_seconds(problem)
        # The ranks that run the longest sequence have so much less time for the others.
        excess_seconds = max(0.0, longest_seconds - sum_seconds / count) * widest / problem.domain_size
        promised_seconds = sum_seconds + (problem.pipeline_stages - 1) * (sum_seconds / count + excess_seconds)
        yield PipelineRules(promised_seconds + _fillers_seconds(problem, max(count, fewest)), count, math.inf)
        count += max(1, count // _FINEST_STEP)


def _as_long_as_the_longest(problem: Problem) -> Iterator[PipelineRules]:
    """No micro-batch longer than the longest sequence by itself, on each of the degrees that hold it."""
    work_seconds, fewest = _work_seconds(problem), _fewest_micro_batches(problem)
    for degree in problem.degrees:
        if problem.holds(degree, -1):
            longest_seconds = problem.sequence_seconds[degree][-1]
            count = max(fewest, math.ceil(work_seconds / longest_seconds)) if longest_seconds > 0 else fewest
            most_seconds = _alone_seconds(problem, degree)
            promised_seconds = work_seconds + count * _opening_seconds(problem) + _fillers_seconds(problem, count)
            promised_seconds += (problem.pipeline_stages - 1) * most_seconds
            yield PipelineRules(promised_seconds, 1, most_seconds * (1 + _ROUNDING_SHARE))


def _work_seconds(problem: Problem) -> float:
    """Of each rank, if the sequences ran on the degrees that take the fewest rank-seconds, shared out evenly."""
    rank_seconds = np.full(len(problem.tokens), np.inf)
    for degree, seconds in problem.seconds_arrays.items():
        if degree in problem.degrees:
            held = np.searchsorted(problem.tokens_array, degree * _slice_tokens(problem), side="right")
            rank_seconds[:held] = np.minimum(rank_seconds[:held], degree * seconds[:held])
    return float(rank_seconds.sum()) / problem.domain_size


def _fewest_micro_batches(problem: Problem) -> int:
    """Of each rank, if they were full."""
    return math.ceil(sum(problem.tokens) / (problem.domain_size * _slice_tokens(problem)))


def _slice_tokens(problem: Problem) -> int:
    return problem.recomputed_tokens_per_rank or problem.tokens_per_rank


def _alone_seconds(problem: Problem, degree: int) -> float:
    """Of a micro-batch that holds the longest sequence and no other."""
    return problem.overhead_seconds + problem.latency_seconds[degree] + problem.sequence_seconds[degree][-1]


def _opening_seconds(problem: Problem) -> float:
    """Of a narrow micro-batch, before it holds a sequence."""
    return problem.overhead_seconds + problem.latency_seconds[problem.degrees[0]]


def _fillers_seconds(problem: Problem, count: int) -> float:
    """Of what makes a whole number of the pipeline's multiple of ``count`` micro-batches."""
    return -count % problem.count_multiple * problem.overhead_seconds
