"""The planner's door: lengths and a cost model in, a legal plan out."""

import math
import time
from collections.abc import Iterable
from dataclasses import replace

from numpy.typing import ArrayLike

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner.bounds import lower_bound_seconds
from megatron_flexsp.planner.cost_model import CostModel
from megatron_flexsp.planner.plan import Plan
from megatron_flexsp.planner.problem import Problem, make_problem
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
    time_limit_seconds: float | None = None,
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
        ``nested`` (degrees never increase; ``auto`` means the same) or ``static`` (one degree for all).
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
    time_limit_seconds
        Stop improving after so long; 0 gives the first legal plan. By default the effort depends on the batch
        alone, so that every process finds the same plan.

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
    )
    if executed_schedule == "static":
        problem = _with_one_degree(problem)
    bound_seconds = lower_bound_seconds(problem)

    found = Plan(
        domain_size=problem.domain_size,
        schedule=executed_schedule,
        micro_batches=search(problem, bound_seconds, deadline),
        predicted_seconds=math.nan,
        lower_bound_seconds=bound_seconds,
        solve_seconds=math.nan,
        status="heuristic",
    )
    predicted_seconds = step_seconds(found, lengths, cost_model)
    is_optimal = math.isclose(predicted_seconds, bound_seconds, rel_tol=1e-9)
    return replace(
        found,
        predicted_seconds=predicted_seconds,
        solve_seconds=time.monotonic() - started,
        status="optimal" if is_optimal else "heuristic",
    )


def _deadline(started: float, time_limit_seconds: float | None) -> float:
    """When, on ``time.monotonic``'s clock, to stop improving."""
    if time_limit_seconds is None:
        return math.inf
    if not time_limit_seconds >= 0:
        raise FlexSPError(f"time_limit_seconds is {time_limit_seconds}; expected at least 0")
    return started + time_limit_seconds


def _checked_schedule(schedule: str, static_degree: int | None) -> str:
    """The schedule that plans will name."""
    if schedule == "lockstep":
        raise FlexSPError(
            "schedule lockstep is not available yet: it comes with the optimising planner; use nested or static"
        )
    if schedule not in ("auto", "nested", "static"):
        raise FlexSPError(f"schedule is {schedule!r}; expected auto, nested or static")
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
