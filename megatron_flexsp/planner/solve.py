"""The planner's door: lengths and a cost model in, a legal plan out."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from numpy.typing import ArrayLike

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner.bounds import lockstep_bound_seconds, simple_bound_seconds
from megatron_flexsp.planner.cost_model import CostModel
from megatron_flexsp.planner.endings import ranks_that_end_early
from megatron_flexsp.planner.exhaustive import best_lockstep, best_nested, is_tiny
from megatron_flexsp.planner.laws import SCHEDULES
from megatron_flexsp.planner.lockstep import in_order, search_rounds
from megatron_flexsp.planner.nested_bound import nested_bound_seconds
from megatron_flexsp.planner.packing import path_seconds, with_fillers
from megatron_flexsp.planner.plans import MicroBatch, Plan
from megatron_flexsp.planner.problem import GAP_WORTH_ANOTHER_SEARCH, Problem, make_problem
from megatron_flexsp.planner.rounds import Round, micro_batches_of
from megatron_flexsp.planner.search import search_degrees
from megatron_flexsp.planner.timing import step_seconds

ASKABLE_SCHEDULES = ("auto", *SCHEDULES, "batch-adaptive")
"""What ``plan`` takes as a schedule; ``auto`` and ``batch-adaptive`` choose among those that plans name."""

_MOST_SEQUENCES_BY_ROUNDS = 128
"""For which a search for rounds takes some tenths of a second."""


def plan(
    lengths: ArrayLike,
    cost_model: CostModel,
    domain_size: int,
    *,
    schedule: str = "nested",
    degrees: Iterable[int] | None = None,
    static_degree: int | None = None,
    token_capacity: int | None = None,
    recomputed_token_capacity: int | None = None,
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
        runs one micro-batch), ``static`` (one degree for all) or ``batch-adaptive`` (a static plan with the best
        degree for this batch: the second baseline of FlexSP, arXiv 2412.01523, section 6).
    degrees
        The degrees that may be used; by default all legal ones for which the cost model has a bandwidth.
    static_degree
        The one degree of a static plan, whatever ``degrees`` says; by default the narrowest allowed one that
        divides the domain and holds the longest sequence.
    token_capacity
        Tokens that a rank can hold in one micro-batch; by default what the cost model's memory constants say.
    recomputed_token_capacity
        Tokens that a rank can hold in a micro-batch whose activations are recomputed. Where it is given, plans do so
        with sequences that would fit in no other way, or only in groups so wide that exchanging costs more, or with
        all; in lockstep with whole rounds, so that all their ranks make the same calls.
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
    _check_schedule(schedule, static_degree)
    problem = make_problem(
        lengths,
        cost_model,
        domain_size,
        degrees=degrees if static_degree is None else [static_degree],
        token_capacity=token_capacity,
        recomputed_token_capacity=recomputed_token_capacity,
        slice_multiple=slice_multiple,
        count_multiple=count_multiple,
        pipeline_stages=pipeline_stages,
    )

    def planned(problem: Problem, schedule: str, deadline: float) -> Plan:
        answer = _solve(problem, schedule, deadline, seed)
        found = Plan(
            problem.domain_size, schedule, answer.micro_batches, math.nan, answer.bound_seconds, math.nan, "heuristic"
        )
        seconds = step_seconds(found, lengths, cost_model, pipeline_stages=pipeline_stages)
        if answer.is_best:  # of all plans, whatever they must end with
            answer = replace(answer, bound_seconds=seconds)
        ended = replace(found, micro_batches=_with_endings(problem, answer.micro_batches))
        if ended != found:
            seconds = step_seconds(ended, lengths, cost_model, pipeline_stages=pipeline_stages)
        return _with_prediction(ended, answer, seconds)

    if schedule == "static":
        found = planned(_static_problems(problem)[0], "static", deadline)
    elif schedule == "batch-adaptive":
        found = _best_static(_static_problems(problem), planned, deadline)
    else:
        found = planned(problem, "nested" if schedule == "auto" else schedule, deadline)
    return replace(found, solve_seconds=time.monotonic() - started)


@dataclass(frozen=True)
class _Answer:
    """What the solvers found for a problem."""

    micro_batches: tuple[MicroBatch, ...]
    bound_seconds: float
    is_best: bool
    """Whether all plans were looked through, so that there is no better one before ``_with_endings``."""

    is_cut_short: bool
    """Whether the time limit ended the search."""


def _solve(problem: Problem, schedule: str, deadline: float, seed: int) -> _Answer:
    """A plan and its bound: by searching, and by going through all plans if they are few."""
    if schedule == "lockstep":
        return _lockstep(problem, deadline, seed)
    return _nested(problem, deadline, seed)


def _nested(problem: Problem, deadline: float, seed: int) -> _Answer:
    """What must be or had better be is recomputed or, where that is faster, every micro-batch is."""
    answer, seconds = _as_it_stands(problem, nested_bound_seconds(problem, deadline), deadline, seed)
    whole = problem.recomputing
    if whole is None:
        return answer
    bound_seconds = simple_bound_seconds(whole)
    if bound_seconds < seconds:
        bound_seconds = nested_bound_seconds(whole, deadline)
    least_seconds, can_pay = min(answer.bound_seconds, bound_seconds), bound_seconds < seconds
    if not can_pay or answer.is_cut_short:
        return replace(answer, bound_seconds=least_seconds, is_best=answer.is_best and not can_pay)
    recomputed, recomputed_seconds = _as_it_stands(whole, bound_seconds, deadline, seed)
    is_best = answer.is_best and recomputed.is_best
    if recomputed_seconds < seconds:
        items = tuple(replace(item, recomputed=not item.is_filler) for item in recomputed.micro_batches)
        answer = replace(recomputed, micro_batches=items)
    return replace(answer, bound_seconds=least_seconds, is_best=is_best, is_cut_short=recomputed.is_cut_short)


def _as_it_stands(problem: Problem, bound_seconds: float, deadline: float, seed: int) -> tuple[_Answer, float]:
    """A nested plan of the problem, and its step before ``_with_endings``."""
    found, is_cut_short = search_degrees(problem, bound_seconds, deadline, seed)
    items, seconds, is_complete = found.micro_batches, found.seconds, False
    if not is_cut_short and _is_worth_a_look_at_rounds(problem, seconds, bound_seconds):
        rounds, _, is_cut_short = search_rounds(problem, bound_seconds, deadline, seed)
        by_rounds = _nested_from_rounds(problem, rounds)
        seconds_by_rounds = path_seconds(problem, by_rounds)
        if seconds_by_rounds < seconds:
            items, seconds = by_rounds, seconds_by_rounds
    if is_tiny(problem) and seconds > bound_seconds:
        better, is_complete = best_nested(problem, seconds, deadline)
        if better is not None:
            items = with_fillers(problem, better)
            seconds = path_seconds(problem, items)
    return _Answer(items, bound_seconds, is_complete, is_cut_short), seconds


def _is_worth_a_look_at_rounds(problem: Problem, seconds: float, bound_seconds: float) -> bool:
    """Whether the search for lockstep rounds, which packs differently, may find better nested micro-batches soon."""
    if problem.recomputed_tokens_per_rank is not None or problem.pipeline_stages > 1:
        return False
    return len(problem.tokens) <= _MOST_SEQUENCES_BY_ROUNDS and seconds > bound_seconds * (1 + GAP_WORTH_ANOTHER_SEARCH)


def _nested_from_rounds(problem: Problem, rounds: list[Round]) -> tuple[MicroBatch, ...]:
    """The micro-batches of lockstep rounds, the widest first. Nobody waits for a round's slowest group any more."""
    holding = [item for item in micro_batches_of(problem, rounds) if not item.is_filler]
    return with_fillers(problem, sorted(holding, key=lambda item: -item.degree))


def _lockstep(problem: Problem, deadline: float, seed: int) -> _Answer:
    bound_seconds = lockstep_bound_seconds(problem, deadline)
    rounds, seconds, is_cut_short = search_rounds(problem, bound_seconds, deadline, seed)
    is_complete = False
    if is_tiny(problem) and seconds > bound_seconds:
        better, is_complete = best_lockstep(problem, seconds, deadline)
        rounds = rounds if better is None else in_order(problem, better)
    return _Answer(micro_batches_of(problem, rounds), bound_seconds, is_complete, is_cut_short)


def _with_prediction(found: Plan, answer: _Answer, predicted_seconds: float) -> Plan:
    """The plan with its step predicted, and its status drawn from the answer's bound."""
    bound_seconds = min(answer.bound_seconds, predicted_seconds)
    status = "heuristic" if answer.is_cut_short else "feasible"
    return _with_bound(replace(found, predicted_seconds=predicted_seconds, status=status), bound_seconds)


def _with_bound(plan: Plan, bound_seconds: float) -> Plan:
    """The plan with a bound on all that may be had in its place; it is optimal where it meets the bound."""
    is_optimal = math.isclose(plan.predicted_seconds, bound_seconds, rel_tol=1e-9)
    return replace(plan, lower_bound_seconds=bound_seconds, status="optimal" if is_optimal else plan.status)


def _with_endings(problem: Problem, micro_batches: tuple[MicroBatch, ...]) -> tuple[MicroBatch, ...]:
    """The micro-batches, and the fillers with which ranks must end (``endings``)."""
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


def _check_schedule(schedule: str, static_degree: int | None) -> None:
    """Refuse a schedule that does not exist, and a degree for one that chooses its own."""
    if schedule not in ASKABLE_SCHEDULES:
        raise FlexSPError(f"schedule is {schedule!r}; expected {', '.join(ASKABLE_SCHEDULES)}")
    if static_degree is not None and schedule != "static":
        raise FlexSPError(f"static_degree {static_degree} needs schedule static; found {schedule}")


def _static_problems(problem: Problem) -> list[Problem]:
    """The problem with each degree, alone, that divides the domain and holds the longest sequence, narrowest first."""
    usable = [
        replace(problem, degrees=(degree,))
        for degree in problem.degrees
        if problem.domain_size % degree == 0 and problem.holds(degree, -1)
    ]
    if not usable:
        raise FlexSPError(
            f"a static plan needs a degree that divides the domain of {problem.domain_size} ranks and holds the "
            f"longest sequence, {problem.tokens[-1]} tokens at "
            f"{problem.recomputed_tokens_per_rank or problem.tokens_per_rank} per rank; none of the "
            f"allowed degrees {', '.join(map(str, problem.degrees))} does",
            "allow another (`degrees`), or use schedule nested",
        )
    return usable


def _best_static(problems: list[Problem], planned: Callable[[Problem, str, float], Plan], deadline: float) -> Plan:
    """The best plan of problems with one degree each; its bound is the least of theirs.

    Most promising first, each with an equal share of the time that is left. Those whose bound lies above the
    best plan need no search.
    """
    by_promise = sorted((_promised_seconds(problem), problem.degrees, problem) for problem in problems)
    best: Plan | None = None
    least_bound = math.inf
    for turn, (bound_seconds, _, problem) in enumerate(by_promise):
        if best is not None and bound_seconds >= best.predicted_seconds:
            break
        now = time.monotonic()
        found = planned(problem, "static", now + (deadline - now) / (len(problems) - turn))
        least_bound = min(least_bound, found.lower_bound_seconds)
        if best is None or found.predicted_seconds < best.predicted_seconds:
            best = found
    assert best is not None, "there is at least one problem"
    return _with_bound(best, min(least_bound, best.predicted_seconds))


def _promised_seconds(problem: Problem) -> float:
    """A bound, quickly, on all plans of a problem, those that recompute every micro-batch among them."""
    return min(simple_bound_seconds(kind) for kind in (problem, problem.recomputing) if kind is not None)
