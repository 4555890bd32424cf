"""What no nested plan can beat, though its ranks run whole numbers of micro-batches.

HiGHS only suggests prices here. The bound is computed from them by an argument that holds for any prices,
so neither a solver's tolerance nor its time limit can make it wrong.
"""

import math
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_flexsp.planner.bounds import MOST_CLASSES, ROUNDING_SHARE, bisect, simple_bound_seconds
from megatron_flexsp.planner.classes import Classes, make_classes
from megatron_flexsp.planner.linear_program import LinearProgram
from megatron_flexsp.planner.problem import Problem

_PRICED_CLASSES = 12
_PRICINGS = 8
_PRICING_SECONDS = 0.05
_LEAST_GAIN = 1e-3
"""The share by which prices must raise the bound for others to be tried."""

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


def nested_bound_seconds(problem: Problem, deadline: float = math.inf) -> float:
    """A lower bound on the step of every legal nested plan (and static plan) with the problem's degrees.

    Sort the ranks into kinds by how many micro-batches they run (``RankKind``). A rank that runs n of them
    within a step of T seconds has n slots (``Classes``), and at most T - n x overhead seconds for the rest.

    Now give every kind prices: w for a second, and for each degree u for the tokens that fill a slot and e for
    an exclusive sequence in it. A slot holds no more tokens than the capacity and one exclusive sequence, and
    takes its degree's latency, so it brings in at most v = u + e - latency x w, for the best degree. Set the
    prices such that no rank of that kind has more than 1 to spend: n v + (T - n x overhead) w <= 1. A sequence
    that runs at degree d on ranks of that kind pays there for its tokens, for d slots if it is exclusive at
    that degree, and for d x seconds; where the ranks are of several kinds, to each its part. So it costs at
    least the least of that over the degrees and the kinds that have room for it (a pack holds it, and
    n x overhead + latency + seconds <= T). All sequences together cost no more than the ranks can spend, which
    is the number of ranks. Hence: **if the least costs add up to more than the number of ranks, no plan takes
    T seconds.** Greater T leaves every rank more to spend, so the greatest such T is found by bisection.

    A rank that runs a single micro-batch does so at one degree, so those ranks are a kind for each degree.
    That is what counts the time that a lone long sequence leaves unused on its ranks. Fillers hold nothing
    and pay the overhead, as counted. Where ``count_multiple`` is c, n is a multiple of c.

    Micro-batches that are recomputed hold more tokens, and no sequence that need not be (``laws.check_capacity``). So a
    sequence that a degree would recompute fills slots of the greater capacity; their latency is taken for the others'.
    Plans that recompute every micro-batch have a problem of their own (``Problem.recomputing``).

    With p pipeline stages, the longest micro-batch of a rank counts p times (``step_seconds``). It is no shorter
    than their mean, so the n micro-batches themselves have no more than T n / (n + p - 1) seconds.

    The argument holds for any prices. The best come from the dual of the linear program that places classes on
    kinds of ranks and degrees and needs as few ranks as it can. What tokens cost beside an exclusive sequence is a
    dual-feasible function of their number (Lueker 1983; Fekete and Schepers, Mathematical Programming 91, 2001).
    """
    bound = simple_bound_seconds(problem)
    coarse, fine = make_classes(problem, _PRICED_CLASSES), make_classes(problem, MOST_CLASSES)
    for _ in range(_PRICINGS):
        if deadline - time.monotonic() < _PRICING_SECONDS:
            break  # what is proved so far is a bound as well
        limit, hoped_for = 2 * bound, (1 + _LEAST_GAIN) * bound
        kinds = rank_kinds(problem, limit)
        prices = Ranks(coarse, kinds).prices(hoped_for)
        if prices is not None:
            bound = Ranks(fine, kinds).greatest_impossible(prices, bound, limit)
        if bound <= hoped_for:
            break
    return bound * (1 - ROUNDING_SHARE)


@dataclass(frozen=True)
class _Prices:
    """What ranks of each kind ask for."""

    second: Floats
    """Shape (kinds,)."""

    tokens: Floats
    """For the tokens that fill a slot, shape (kinds, degrees)."""

    exclusive: Floats
    """For an exclusive sequence in a slot, shape (kinds, degrees)."""

    slot: Floats
    """The most that a slot brings in, shape (kinds,)."""


class Ranks:
    """What classes take of ranks of each kind, and what such ranks have.

    Arrays are (kinds,), (budgets, kinds), or (kinds, degrees, classes).
    """

    def __init__(self, classes: Classes, kinds: list[RankKind]) -> None:
        problem = classes.problem
        self._problem, self._classes = problem, classes
        self._counts = np.array([[kind.fewest for kind in kinds], [kind.most for kind in kinds]])
        latencies = np.array([problem.latency_seconds[degree] for degree in problem.degrees])
        allowed = np.array([[kind.degree in (None, degree) for degree in problem.degrees] for kind in kinds])
        # Ranks of one degree have paid its latency when their budget is counted, the others pay for each slot.
        of_one_degree = np.array([[kind.degree is not None] for kind in kinds])
        self._paid_latencies = np.where(allowed & of_one_degree, latencies, 0.0).sum(axis=1)
        self._slot_latencies = np.where(of_one_degree, 0.0, latencies)
        own = problem.pipeline_stages * (problem.overhead_seconds + classes.seconds)
        before = (self._counts[0] - 1) * problem.overhead_seconds
        self._needed = np.where(allowed[:, :, None] & classes.holds, before[:, None, None] + own, np.inf)

    def budgets(self, step: float) -> tuple[Floats, Floats]:
        """Slots and seconds that a rank has: those of its fewest and of its most micro-batches.

        Every other count lies between the two. Nothing where the step is too short for even the fewest.
        """
        problem = self._problem
        steps = step * self._counts[1] / (self._counts[1] + problem.pipeline_stages - 1)
        slots = self._counts.astype(np.float64)
        seconds = steps - slots * problem.overhead_seconds - self._paid_latencies
        is_late = seconds < 0
        if is_late.any():  # as many as there is time for, whole or not: more than there is room for
            slots[1] = np.where(is_late[1], steps / (problem.overhead_seconds or 1.0), slots[1])
            slots[:, is_late[0]] = 0
        return slots, np.maximum(0.0, seconds)

    def prices(self, step: float) -> _Prices | None:
        """Good prices for proving that a step is impossible; None where the linear program has no answer.

        The program chooses how many ranks of each kind there are, how many of their slots are used at each
        degree, and which part of each class runs there, so that it needs as few ranks as it can. The prices
        are the duals of a kind's seconds, and of a degree's tokens and exclusive sequences on it.
        """
        classes, fits = self._classes, self._needed <= step
        num_kinds, num_degrees, num_classes = fits.shape
        program = LinearProgram()
        class_rows = program.add_rows(num_classes, lower=1.0)
        slot_rows, second_rows = program.add_rows(num_kinds, upper=0.0), program.add_rows(num_kinds, upper=0.0)
        token_rows = program.add_rows(num_kinds * num_degrees, upper=0.0).reshape(num_kinds, num_degrees)
        exclusive_rows = program.add_rows(num_kinds * num_degrees, upper=0.0).reshape(num_kinds, num_degrees)
        for slots, seconds in zip(*self.budgets(step), strict=True):
            program.add_columns(np.ones(num_kinds), [(slot_rows, -slots), (second_rows, -seconds)])
        kind, degree = np.nonzero(fits.any(axis=2))
        used_slots: list[tuple[ArrayLike, ArrayLike]] = [
            (slot_rows[kind], 1.0),
            (second_rows[kind], self._slot_latencies[kind, degree]),
            (token_rows[kind, degree], -1.0),
            (exclusive_rows[kind, degree], -1.0),
        ]
        program.add_columns(np.zeros(len(kind)), used_slots)
        kind, degree, class_ = np.nonzero(fits)
        placed: list[tuple[ArrayLike, ArrayLike]] = [
            (class_rows[class_], 1.0),
            (token_rows[kind, degree], classes.full_slots[degree, class_]),
            (exclusive_rows[kind, degree], classes.exclusive_slots[degree, class_]),
            (second_rows[kind], classes.work[degree, class_]),
        ]
        program.add_columns(np.zeros(len(kind)), placed)
        solution = program.solve()
        if solution is None:
            return None
        duals = np.maximum(0.0, -solution.row_duals)
        return self.with_slot_prices(duals[second_rows], duals[token_rows], duals[exclusive_rows])

    def with_slot_prices(self, second: Floats, tokens: Floats, exclusive: Floats) -> _Prices:
        """The prices, those of tokens raised as far as a slot of another degree brings in more anyway."""
        latencies = self._slot_latencies * second[:, None]
        slot = np.maximum(0.0, (tokens + exclusive - latencies).max(axis=1))
        return _Prices(second, np.maximum(tokens, slot[:, None] + latencies - exclusive), exclusive, slot)

    def greatest_impossible(self, prices: _Prices, low: float, limit: float) -> float:
        """The greatest step from ``low`` to ``limit`` that the prices show to be impossible, bisected from below."""
        classes = self._classes
        costs = prices.tokens[:, :, None] * classes.full_slots
        costs += prices.exclusive[:, :, None] * classes.exclusive_slots
        costs += prices.second[:, None, None] * classes.work

        def is_impossible(step: float) -> bool:
            slots, seconds = self.budgets(step)
            most = (slots * prices.slot + seconds * prices.second).max(axis=0)[:, None]
            cheapest = np.where(self._needed <= step, costs, np.inf).min(axis=1)
            # Where a kind's prices are all 0, its ranks take what they have room for at no cost.
            shares = np.divide(cheapest, most, out=np.where(np.isfinite(cheapest), 0.0, np.inf), where=most > 0)
            # By more than rounding: where seconds cost nothing, the two sides may be equal at every step.
            return bool(shares.min(axis=0).sum() > self._problem.domain_size * (1 + ROUNDING_SHARE))

        if not is_impossible(low):
            return low
        high = low
        while high < limit:
            high = min(limit, 1.05 * high)
            if not is_impossible(high):
                return bisect(is_impossible, low, high)
            low = high
        return limit


def rank_kinds(problem: Problem, longest_step: float) -> list[RankKind]:
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
