"""What no plan can beat. A bound tells how good a plan is without knowing the best one.

HiGHS only suggests prices here. The bound is computed from them by an argument that holds for any prices,
so neither a solver's tolerance nor its time limit can make it wrong.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_flexsp.planner.linear_program import LinearProgram
from megatron_flexsp.planner.problem import Problem

# Sums of many seconds round; the bound gives up this share so that rounding cannot lift it above a plan.
_ROUNDING_SHARE = 1e-10

_MOST_CLASSES = 192
_PRICED_CLASSES = 20
_PRICINGS = 8
_PRICING_SECONDS = 0.05
_FIRST_GAIN = 5e-3
_LEAST_GAIN = 5e-4
_BISECTIONS = 9
_WHOLE_COUNTS = 6

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RankKind:
    """Ranks by how many micro-batches they run, fillers counted."""

    fewest: int
    """The least number of micro-batches."""

    most: int
    """The greatest number of micro-batches."""

    degree: int | None = None
    """The degree of the only micro-batch, for ranks that run one."""


@dataclass(frozen=True)
class Classes:
    """Sequences in classes of similar length, each priced, per token, as its shortest member."""

    tokens: Floats
    """Tokens of all sequences of a class, shape (classes,)."""

    shortest: NDArray[np.int64]
    """The shortest sequence of a class, as its number in the problem, shape (classes,)."""

    problem: Problem

    @cached_property
    def shortest_tokens(self) -> NDArray[np.int64]:
        """Tokens of the shortest sequence of each class."""
        return self.problem.tokens_array[self.shortest]

    @cached_property
    def seconds(self) -> Floats:
        """What the shortest member takes a group of each degree, latency counted, shape (degrees, classes)."""
        problem = self.problem
        rows = [problem.seconds_arrays[degree][self.shortest] for degree in problem.degrees]
        return np.asarray(np.stack(rows) + self._latencies)

    @cached_property
    def holds(self) -> NDArray[np.bool_]:
        """Whether a pack of each degree can hold the shortest member, shape (degrees, classes)."""
        packs = np.array([[self.problem.pack_tokens(degree)] for degree in self.problem.degrees])
        return np.asarray(self.shortest_tokens <= packs)

    @cached_property
    def seconds_per_token(self) -> Floats:
        """Rank-seconds of one token at each degree, at least, shape (degrees, classes).

        Time over tokens does not decrease with length, so the shortest member's share is the least. A pack
        holds at most C tokens per rank, so every token carries 1/C of its micro-batch's latency at least.
        """
        return np.asarray(self.work_per_token + self._latencies / self.problem.tokens_per_rank)

    @cached_property
    def work_per_token(self) -> Floats:
        """The same without latency."""
        degrees = np.array(self.problem.degrees)[:, None]
        return np.asarray((self.seconds - self._latencies) * degrees / self.shortest_tokens)

    @cached_property
    def _latencies(self) -> Floats:
        return np.array([[self.problem.latency_seconds[degree]] for degree in self.problem.degrees])


def make_classes(problem: Problem, most: int) -> Classes:
    """At most about ``most`` classes, of as equal tokens as can be, cut where a degree's capacity ends."""
    tokens = problem.tokens_array
    if len(tokens) <= most:
        starts = np.arange(len(tokens))
    else:
        sums = np.cumsum(tokens, dtype=np.float64)
        even = np.searchsorted(sums, np.linspace(0.0, sums[-1], most, endpoint=False)[1:])
        packs = [problem.pack_tokens(degree) for degree in problem.degrees]
        cuts = np.concatenate([[0], even, np.searchsorted(tokens, packs, side="right")])
        starts = np.unique(cuts[cuts < len(tokens)])
    return Classes(np.add.reduceat(tokens, starts).astype(np.float64), starts, problem)


def nested_bound_seconds(problem: Problem, deadline: float = math.inf) -> float:
    """A lower bound on the step of every legal nested plan (and static plan) with the problem's degrees.

    Sort the ranks into kinds by how many micro-batches they run (``RankKind``). A rank that runs n of them
    within a step of T seconds holds at most n C tokens, C being the tokens per rank, since slices are padded
    up and C is whole slices; and it has at most T - n x overhead seconds for the rest.

    Now give every kind two prices, v for a token and w for a second, such that no rank of that kind has more
    than 1 to spend: n C v + (T - n x overhead) w <= 1. A sequence of s tokens that runs at degree d on ranks
    of that kind uses s tokens and d x seconds of them (s / d and seconds on each of d ranks; where the ranks
    are of several kinds, on each its share). So it costs at least the least, over the degrees and the kinds
    that have room for it (s <= d C and n x overhead + latency + seconds <= T), of s v + d x seconds x w.
    All sequences together cost no more than the ranks can spend, which is the number of ranks. Hence:
    **if the least costs add up to more than the number of ranks, no plan takes T seconds.** Greater T leaves
    every rank more to spend, so the greatest such T is found by bisection.

    A rank that runs a single micro-batch does so at one degree, so those ranks are a kind for each degree.
    That is what counts the time that a lone long sequence leaves unused on its ranks. Fillers hold nothing
    and pay the overhead, as counted. Where ``count_multiple`` is c, n is a multiple of c.

    With p pipeline stages, the longest micro-batch of a rank counts p times (``step_seconds``). It is no shorter
    than their mean, so the n micro-batches themselves have no more than T n / (n + p - 1) seconds.

    The argument holds for any prices. The best come from the dual of the linear program that places tokens on
    kinds of ranks and needs as few ranks as it can.
    """
    bound = simple_bound_seconds(problem)
    coarse, fine = make_classes(problem, _PRICED_CLASSES), make_classes(problem, _MOST_CLASSES)
    hoped_for = _FIRST_GAIN
    for _ in range(_PRICINGS):
        if deadline - time.monotonic() < _PRICING_SECONDS:
            break  # what is proved so far is a bound as well
        limit = 2 * bound
        kinds = _rank_kinds(problem, limit)
        prices = _prices(coarse, kinds, bound * (1 + hoped_for))
        before = bound
        if prices is not None:
            bound = _greatest_impossible(fine, kinds, prices, bound, limit)
        if bound <= before * (1 + hoped_for):
            if hoped_for == _LEAST_GAIN:
                break
            hoped_for = _LEAST_GAIN
    return bound * (1 - _ROUNDING_SHARE)


def lockstep_bound_seconds(problem: Problem, deadline: float = math.inf) -> float:
    """A lower bound on the step of every legal lockstep plan with the problem's degrees.

    In lockstep all ranks run the same number n of micro-batches, so n C N tokens must hold the batch. Take a
    plan of n rounds and T seconds. Each round lasts at least its overhead, so a sequence can only run at a
    degree that holds it and for which n x overhead + latency + seconds <= T. Ranks are busy for no more than
    N T rank-seconds, of which n N overheads and at least the cheapest such degree of every sequence. The
    least T that meets this, for the best n, is the bound. More rounds than meet the bound by their overheads
    alone need not be tried.

    With p pipeline stages, the longest round counts p times. It is no shorter than the mean round, so T is at
    least 1 + (p - 1) / n times the rounds' sum; and a sequence's own round counts p times, or a longer one.
    """
    simple = simple_bound_seconds(problem)
    if deadline - time.monotonic() < _PRICING_SECONDS:
        return simple * (1 - _ROUNDING_SHARE)
    counts = lockstep_count_bounds(problem, least_rounds(problem), len(problem.tokens) + 1, math.inf)
    return max(simple, min(counts.values())) * (1 - _ROUNDING_SHARE)


def lockstep_count_bounds(problem: Problem, fewest: int, how_many: int, limit: float) -> dict[int, float]:
    """For numbers of rounds from ``fewest`` on, a lower bound on the step of plans with so many.

    Stops after ``how_many`` numbers, or where the overheads alone exceed the limit or the best bound so far.
    """
    classes = make_classes(problem, _MOST_CLASSES)
    floor, stages = simple_bound_seconds(problem), problem.pipeline_stages
    bounds: dict[int, float] = {}
    for turn in range(how_many):
        count = fewest + turn * problem.count_multiple
        best = min(limit, min(bounds.values(), default=math.inf))
        if bounds and (
            (count + stages - 1) * problem.overhead_seconds >= best or (limit == math.inf and best <= floor)
        ):
            break
        bounds[count] = _least_lockstep(classes, count, floor)
        if limit == math.inf and problem.overhead_seconds == 0 and stages == 1:
            break  # further rounds cost nothing and, for all that this bound knows, gain nothing
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
    count is also at least 1 and a multiple of ``count_multiple``, so the sum is one too. All that is spread
    over N ranks, and the step ends no sooner than the mean of the ranks' busy times. Waiting, for members of
    a group or for a lockstep round, only adds to it.

    *Longest sequence.* Some rank runs the micro-batch that holds it, at one of the degrees that can hold it,
    and runs at least ``count_multiple`` micro-batches, each with its overhead.

    With a pipeline, a rank's micro-batches take no longer than without, and the longest one counts once more
    for each further stage.

    A static plan keeps to one degree: give a problem with that degree alone.
    """
    return max(_work_bound(problem), _longest_sequence_bound(problem))


def _work_bound(problem: Problem) -> float:
    classes = make_classes(problem, _MOST_CLASSES)
    rates = np.where(classes.holds, classes.seconds_per_token, np.inf).min(axis=0)
    full_slices = math.ceil(int(problem.tokens_array.sum()) / problem.tokens_per_rank)
    groups_of_slices = max(problem.domain_size, math.ceil(full_slices / problem.count_multiple))
    overheads = groups_of_slices * problem.count_multiple * problem.overhead_seconds
    return float((overheads + (rates * classes.tokens).sum()) / problem.domain_size)


def _longest_sequence_bound(problem: Problem) -> float:
    own = problem.pipeline_stages - 1  # with a pipeline, its micro-batch or a longer one counts so often more
    return min(
        problem.opening_seconds(degree, count=0)
        + own * (problem.overhead_seconds + problem.latency_seconds[degree])
        + (1 + own) * problem.sequence_seconds[degree][-1]
        for degree in problem.degrees
        if problem.tokens[-1] <= problem.pack_tokens(degree)
    )


def _least_lockstep(classes: Classes, count: int, floor: float) -> float:
    """The least step, at least ``floor``, that ``count`` rounds could take for all that the bound knows."""
    problem, stages = classes.problem, classes.problem.pipeline_stages
    overheads = count * problem.overhead_seconds
    needed = (count - 1) * problem.overhead_seconds + stages * (problem.overhead_seconds + classes.seconds)
    fill_and_drain = 1 + (stages - 1) / count

    def is_impossible(step: float) -> bool:
        fits = classes.holds & (needed <= step)
        rates = np.where(fits, classes.seconds_per_token, np.inf).min(axis=0)
        return bool((overheads + (rates * classes.tokens).sum() / problem.domain_size) * fill_and_drain > step)

    low = floor
    while is_impossible(high := 1.05 * low):
        low = high
    return _bisect(is_impossible, low, high) if is_impossible(low) else low


def _bisect(is_impossible: Callable[[float], bool], low: float, high: float) -> float:
    """An impossible step close below the least one that is not; ``low`` is impossible, ``high`` is not."""
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if is_impossible(middle):
            low = middle
        else:
            high = middle
    return low


def _rank_kinds(problem: Problem, longest_step: float) -> list[RankKind]:
    """Kinds that together hold every rank of a plan that takes at most ``longest_step``.

    Small counts, and those about the mean, are kinds of their own; the counts between are lumped together.
    """
    multiple = problem.count_multiple
    turns = -(-(len(problem.tokens) + 1) // multiple)  # fillers beyond these are of no use
    if problem.overhead_seconds > 0:
        turns = max(1, min(turns, int(longest_step / problem.overhead_seconds / multiple)))
    per_turn = problem.domain_size * problem.tokens_per_rank * multiple
    mean_turns = int(problem.tokens_array.sum() / per_turn)
    whole = {1, 2, *range(mean_turns - 1, mean_turns + 4)}
    if mean_turns <= _WHOLE_COUNTS - 3:
        whole |= set(range(1, _WHOLE_COUNTS + 1))
    kinds = []
    if multiple == 1:
        kinds += [RankKind(1, 1, degree) for degree in problem.degrees]
        whole.discard(1)
        previous = 1
    else:
        previous = 0
    for turn in sorted(turn for turn in whole if previous < turn <= turns):
        if turn > previous + 1:
            kinds.append(RankKind((previous + 1) * multiple, (turn - 1) * multiple))
        kinds.append(RankKind(turn * multiple, turn * multiple))
        previous = turn
    if turns > previous:
        kinds.append(RankKind((previous + 1) * multiple, turns * multiple))
    return kinds


def _needed_seconds(classes: Classes, kind: RankKind) -> Floats:
    """The step that a rank of a kind needs at least if it runs a class, shape (degrees, classes)."""
    problem = classes.problem
    own = problem.pipeline_stages * (problem.overhead_seconds + classes.seconds)
    return (kind.fewest - 1) * problem.overhead_seconds + own


def _cheapest_rates(classes: Classes, kind: RankKind, step: float) -> Floats:
    """Least rank-seconds per token of each class on ranks of a kind; infinite where they have no room for it."""
    problem = classes.problem
    fits = classes.holds & (_needed_seconds(classes, kind) <= step)
    if kind.degree is not None:  # the purse has paid its latency
        row = problem.degrees.index(kind.degree)
        return np.where(fits[row], classes.work_per_token[row], np.inf)
    return np.asarray(np.where(fits, classes.seconds_per_token, np.inf).min(axis=0))


def _purses(problem: Problem, kind: RankKind, step: float) -> list[tuple[float, float]]:
    """Tokens and seconds that a rank of the kind has: those of its fewest and of its most micro-batches.

    Every other count lies between the two. None where the step is too short for even the fewest.
    """
    latency = 0.0 if kind.degree is None else problem.latency_seconds[kind.degree]
    step *= kind.most / (kind.most + problem.pipeline_stages - 1)
    purses = []
    for count in sorted({kind.fewest, kind.most}):
        seconds = step - count * problem.overhead_seconds - latency
        if seconds >= 0:
            purses.append((float(count * problem.tokens_per_rank), seconds))
    if len(purses) == 1 and kind.most > kind.fewest:
        most = step / problem.overhead_seconds  # not a whole number: more than there is room for
        purses.append((most * problem.tokens_per_rank, 0.0))
    return purses


def _prices(classes: Classes, kinds: list[RankKind], step: float) -> list[tuple[float, float]] | None:
    """Prices of a token and of a second on ranks of each kind; None where the linear program has no answer.

    The program places the tokens of every class on kinds of ranks, each kind at its cheapest degree, and needs
    as few ranks as it can. The prices are the duals of the kinds' tokens and seconds.
    """
    program = LinearProgram()
    for tokens in classes.tokens.tolist():
        program.add_row(lower=tokens, upper=tokens)
    rows: list[tuple[int, int]] = []
    for kind in kinds:
        token_row, second_row = program.add_row(upper=0.0), program.add_row(upper=0.0)
        rows.append((token_row, second_row))
        for tokens, seconds in _purses(classes.problem, kind, step):
            program.add_columns(1.0, [(token_row, -tokens), (second_row, -seconds)])
        rates = _cheapest_rates(classes, kind, step)
        placed = np.flatnonzero(np.isfinite(rates))
        program.add_columns(np.zeros(len(placed)), [(placed, 1.0), (token_row, 1.0), (second_row, rates[placed])])
    solution = program.solve()
    if solution is None:
        return None
    duals = np.maximum(0.0, -solution.row_duals)
    return [(float(duals[token_row]), float(duals[second_row])) for token_row, second_row in rows]


def _greatest_impossible(
    classes: Classes, kinds: list[RankKind], prices: list[tuple[float, float]], low: float, limit: float
) -> float:
    """The greatest step from ``low`` to ``limit`` that the prices show to be impossible, bisected from below."""
    problem = classes.problem
    shape = (len(kinds), len(problem.degrees), len(classes.tokens))
    rates, needed = np.full(shape, np.inf), np.empty(shape)
    for index, kind in enumerate(kinds):
        rows = slice(None)
        per_token = classes.seconds_per_token
        if kind.degree is not None:
            row = problem.degrees.index(kind.degree)
            rows, per_token = slice(row, row + 1), classes.work_per_token
        rates[index, rows] = np.where(classes.holds[rows], per_token[rows], np.inf)
        needed[index] = _needed_seconds(classes, kind)
    token_prices, second_prices = np.array(prices).T[:, :, None]

    def is_impossible(step: float) -> bool:
        most = np.zeros((len(kinds), 1))
        for index, (kind, (token_price, second_price)) in enumerate(zip(kinds, prices, strict=True)):
            purses = _purses(problem, kind, step)
            most[index] = max((tokens * token_price + seconds * second_price for tokens, seconds in purses), default=0)
        cheapest = np.where(needed <= step, rates, np.inf).min(axis=1)
        has_room = np.isfinite(cheapest)
        costs = np.where(has_room, token_prices + second_prices * np.where(has_room, cheapest, 0.0), np.inf)
        # Where a kind's prices are all 0, its ranks take what they have room for at no cost.
        costs = np.divide(costs, most, out=np.where(has_room, 0.0, np.inf), where=most > 0)
        return bool((costs.min(axis=0) * classes.tokens).sum() > problem.domain_size)

    if not is_impossible(low):
        return low
    high = low
    while high < limit:
        high = min(limit, 1.05 * high)
        if not is_impossible(high):
            return _bisect(is_impossible, low, high)
        low = high
    return limit
