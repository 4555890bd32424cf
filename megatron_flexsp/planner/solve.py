"""The planner's door: lengths and a cost model in, a legal plan out."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from numpy.typing import ArrayLike

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner.bounds import lockstep_bound_seconds, nested_bound_seconds
from megatron_flexsp.planner.cost_model import CostModel
from megatron_flexsp.planner.endings import ranks_that_end_early
from megatron_flexsp.planner.exhaustive import best_lockstep, best_nested, is_tiny
from megatron_flexsp.planner.laws import SCHEDULES
from megatron_flexsp.planner.lockstep import in_order, search_rounds
from megatron_flexsp.planner.packing import with_fillers
from megatron_flexsp.planner.plans import MicroBatch, Plan
from megatron_flexsp.planner.problem import Problem, make_problem
from megatron_flexsp.planner.rounds import micro_batches_of
from megatron_flexsp.planner.search import search
from megatron_flexsp.planner.timing import step_seconds


def plan(
    lengths: ArrayLike,
    cost_model: CostModel,
    domain_size: int,
    *,
    schedule: str = "nested",
    degrees: Iterable[int] | None = None,
    static_degree: int | None = None,
    token_capacity: int | None = None,
    slice_multiple: int = 1,
    count_multiple: int = 1,
    pipeline_stages: int = 1,
    time_limit_seconds: float | None = None,
    seed: int = 0,
) -> Plan:
    """Plan one global batch.

    Parameters
    ----------
    lengths
        Tokens of each sequence, whole numbers of at least 1, shape (sequences,).
    cost_model
        What micro-batches cost on this cluster.
    domain_size
        Ranks in the domain.
    schedule
        ``nested`` (degrees never increase; ``auto`` means the same), ``lockstep`` (rounds in which every rank
        runs one micro-batch) or ``static`` (one degree for all).
    degrees
        The degrees that may be used; by default all legal ones for which the cost model has a bandwidth.
    static_degree
        The one degree of a static plan, whatever ``degrees`` says; by default the narrowest allowed one that
        divides the domain and holds the longest sequence.
    token_capacity
        Tokens that a rank can hold in one micro-batch; by default what the cost model's memory constants say.
    slice_multiple
        Each rank's slice of a pack is padded up to a multiple of so many tokens.
    count_multiple
        Each rank runs a multiple of so many micro-batches.
    pipeline_stages
        Stages of the pipeline; the step counts its fill and drain (``step_seconds``).
    time_limit_seconds
        Stop improving after so long; 0 gives the first legal plan. By default the effort depends on the batch
        alone, so that every process finds the same plan; a limit that cuts the search short can make plans of
        equal batches differ.
    seed
        Of the random choices that the search makes.

    Returns
    -------
    A plan that keeps every law of ``Plan.validate``.

    Raises
    ------
    FlexSPError
        If an argument makes no sense, or a sequence is too long for the widest allowed group.
    """
    started = time.monotonic()
    deadline = _deadline(started, time_limit_seconds)
    executed_schedule = _checked_schedule(schedule, static_degree)
    problem = make_problem(
        lengths,
        cost_model,
        domain_size,
        degrees=degrees if static_degree is None else [static_degree],
        token_capacity=token_capacity,
        slice_multiple=slice_multiple,
        count_multiple=count_multiple,
        pipeline_stages=pipeline_stages,
    )
    if executed_schedule == "static":
        problem = _with_one_degree(problem)
    answer = _solve(problem, executed_schedule, deadline, seed)
    found = Plan(
        domain_size=problem.domain_size,
        schedule=executed_schedule,
        micro_batches=_with_endings(problem, answer.micro_batches),
        predicted_seconds=math.nan,
        lower_bound_seconds=answer.bound_seconds,
        solve_seconds=math.nan,
        status="heuristic",
    )
    predicted_seconds = step_seconds(found, lengths, cost_model, pipeline_stages=pipeline_stages)
    bound_seconds = predicted_seconds if answer.is_best else answer.bound_seconds
    if math.isclose(predicted_seconds, bound_seconds, rel_tol=1e-9):
        status = "optimal"
    else:
        status = "heuristic" if answer.is_cut_short else "feasible"
    return replace(
        found,
        predicted_seconds=predicted_seconds,
        lower_bound_seconds=min(bound_seconds, predicted_seconds),
        solve_seconds=time.monotonic() - started,
        status=status,
    )


@dataclass(frozen=True)
class _Answer:
    """What the solvers found for a problem."""

    micro_batches: tuple[MicroBatch, ...]
    bound_seconds: float
    is_best: bool
    """Whether all plans were looked through, so that there is no better one."""

    is_cut_short: bool
    """Whether the time limit ended the search."""


def _solve(problem: Problem, schedule: str, deadline: float, seed: int) -> _Answer:
    """A plan and its bound: by searching, and by going through all plans if they are few."""
    if schedule == "lockstep":
        return _lockstep(problem, deadline, seed)
    return _nested(problem, deadline, seed)


def _nested(problem: Problem, deadline: float, seed: int) -> _Answer:
    bound_seconds = nested_bound_seconds(problem, deadline)
    found, is_cut_short = search(problem, bound_seconds, deadline, seed)
    if is_tiny(problem) and found.seconds > bound_seconds:
        better, is_complete = best_nested(problem, found.seconds, deadline)
        items = found.micro_batches if better is None else with_fillers(problem, better)
        return _Answer(items, bound_seconds, is_complete, is_cut_short)
    return _Answer(found.micro_batches, bound_seconds, False, is_cut_short)


def _lockstep(problem: Problem, deadline: float, seed: int) -> _Answer:
    bound_seconds = lockstep_bound_seconds(problem, deadline)
    rounds, seconds, is_cut_short = search_rounds(problem, bound_seconds, deadline, seed)
    is_complete = False
    if is_tiny(problem) and seconds > bound_seconds:
        better, is_complete = best_lockstep(problem, seconds, deadline)
        rounds = rounds if better is None else in_order(problem, better)
    return _Answer(micro_batches_of(problem, rounds), bound_seconds, is_complete, is_cut_short)


def _with_endings(problem: Problem, micro_batches: tuple[MicroBatch, ...]) -> tuple[MicroBatch, ...]:
    """The micro-batches, and the fillers with which ranks must end (``endings``); they cost no time."""
    ranks = ranks_that_end_early(micro_batches, problem.domain_size, problem.count_multiple)
    fillers = [MicroBatch(int(rank), 1, ()) for rank in ranks for _ in range(problem.count_multiple)]
    return (*micro_batches, *fillers)


def _deadline(started: float, time_limit_seconds: float | None) -> float:
    """When, on ``time.monotonic``'s clock, to stop improving."""
    if time_limit_seconds is None:
        return math.inf
    if not time_limit_seconds >= 0:
        raise FlexSPError(f"time_limit_seconds is {time_limit_seconds}; expected at least 0")
    return started + time_limit_seconds


def _checked_schedule(schedule: str, static_degree: int | None) -> str:
    """The schedule that plans will name."""
    if schedule not in ("auto", *SCHEDULES):
        raise FlexSPError(f"schedule is {schedule!r}; expected auto, {', '.join(SCHEDULES)}")
    if static_degree is not None and schedule != "static":
        raise FlexSPError(f"static_degree {static_degree} needs schedule static; found {schedule}")
    return "nested" if schedule == "auto" else schedule


def _with_one_degree(problem: Problem) -> Problem:
    """The problem with the narrowest degree that divides the domain and holds the longest sequence."""
    for degree in problem.degrees:
        if problem.domain_size % degree == 0 and problem.tokens[-1] <= problem.pack_tokens(degree):
            return replace(problem, degrees=(degree,))
    raise FlexSPError(
        f"a static plan needs a degree that divides the domain of {problem.domain_size} ranks and holds the "
        f"longest sequence, {problem.tokens[-1]} tokens at {problem.tokens_per_rank} per rank; none of the "
        f"allowed degrees {', '.join(map(str, problem.degrees))} does; allow another, or use schedule nested"
    )
