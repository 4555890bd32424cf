"""Seconds of measured steps in, the constants of a cost model out.

Every constant enters a step's seconds linearly, so that the fit is one linear program: least absolute deviations,
each relative to the median of its kind, no constant negative. A run that something disturbed counts as one deviation,
however large, and the fit passes it by as a median would.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner.cost_model import EXCHANGED_AGAIN, CostModel
from megatron_flexsp.planner.linear_program import LinearProgram

_LEAST_SHARE_OF_LINEAR = 1e-3
"""An exchange too cheap to be seen still gets this share of a token's compute, so that bandwidths are finite."""

_FILL_SHARES = tuple(k / 20 for k in range(21))


@dataclass(frozen=True)
class Sample:
    """One measured step, all of whose micro-batches are alike."""

    degree: int
    tokens: float
    """Tokens of a pack."""

    tokens_squared: float
    """Sum of its squared lengths."""

    rounds: float
    """Micro-batches that each rank runs."""

    seconds: float
    further_stages: int = 0
    """Pipeline stages beside one: the step counts a share of a micro-batch's seconds for each, as fill and drain."""

    recomputed: bool = False
    """Whether its micro-batches recompute their activations."""

    def times(self, fill_share: float) -> float:
        """How often a micro-batch's seconds count in the step's."""
        return self.rounds + fill_share * self.further_stages


@dataclass(frozen=True)
class Constants:
    """What a fit found; seconds, by what they are multiplied with."""

    step: float
    micro_batch: float
    token: float
    """Compute of one token, to be divided by the degree."""

    token_squared: float
    latency: Mapping[int, float]
    """Of a micro-batch's exchanges beside their bytes, by degree."""

    exchanged_token: Mapping[int, float]
    """Exchanging one token of a rank's slice, by degree."""

    fill_share: float = 1.0
    """What a further stage of a pipeline adds to a step, in micro-batches."""

    recompute_share: float = CostModel.recompute_share
    """What recomputing adds to a micro-batch, its exchanges aside."""

    def seconds(self, sample: Sample) -> float:
        """What they predict for a step; ``sample.seconds`` is not read."""
        compute, exchange = self.parts(sample)
        if sample.recomputed:
            compute, exchange = compute * (1 + self.recompute_share), exchange * (1 + EXCHANGED_AGAIN)
        return self.step + compute + exchange

    def parts(self, sample: Sample) -> tuple[float, float]:
        """Seconds of a step's micro-batches if nothing is recomputed: their compute and overhead, their exchanges."""
        work = self.token_squared * sample.tokens_squared + self.token * sample.tokens
        times, exchange = sample.times(self.fill_share), 0.0
        if sample.degree > 1:
            exchange = self.exchanged_token[sample.degree] * sample.tokens / sample.degree
            exchange += self.latency[sample.degree]
        return times * (self.micro_batch + work / sample.degree), times * exchange


def fit(samples: Sequence[Sample], least_exchange: Mapping[int, float] | None = None) -> Constants:
    """The constants that explain the samples best.

    The share of a pipeline's further stages multiplies the other constants, so it is found by trying some. That of
    recomputing does too, and is found last, from the samples that recompute, which say nothing of the rest.

    Parameters
    ----------
    samples
        Measured steps; repetitions of one are given one by one.
    least_exchange
        By degree, seconds that exchanging one token of a slice takes at least.

    Raises
    ------
    FlexSPError
        If the samples are too few to tell the constants apart, or a time is not positive.
    """
    if not all(math.isfinite(sample.seconds) and sample.seconds > 0 for sample in samples):
        raise FlexSPError("a measured step took no time or no finite time: the clock can't be trusted")
    recomputed = [sample for sample in samples if sample.recomputed]
    samples = [sample for sample in samples if not sample.recomputed]
    seconds = np.array([sample.seconds for sample in samples])
    shares = _FILL_SHARES if any(sample.further_stages for sample in samples) else (1.0,)
    # Not by each one's own: of equal deviations those of fast runs would then weigh more than those of slow ones.
    medians = np.empty(len(samples))
    for alike in _kinds(samples):
        medians[alike] = np.median(seconds[alike])

    def deviation(constants: Constants) -> float:
        predicted = np.array([constants.seconds(sample) for sample in samples])
        return float((np.abs(predicted - seconds) / medians).sum())

    fits = [_fit_with(samples, seconds, medians, least_exchange or {}, share) for share in shares]
    best = min(fits, key=deviation)
    return replace(best, recompute_share=_recompute_share(best, recomputed)) if recomputed else best


def _recompute_share(constants: Constants, samples: Sequence[Sample]) -> float:
    """The share of least absolute deviations: a median of what each sample says, weighted by how much that counts."""
    shares, weights = [], []
    for sample in samples:
        compute, exchange = constants.parts(sample)
        if compute == 0:  # so small a job that all seems to be a step's
            continue
        rest = sample.seconds - constants.step - (1 + EXCHANGED_AGAIN) * exchange
        shares.append(max(0.0, rest / compute - 1))
        weights.append(compute / sample.seconds)
    if not shares:
        return constants.recompute_share
    order = np.argsort(shares)
    reached = np.cumsum(np.array(weights)[order])
    return shares[int(order[np.searchsorted(reached, reached[-1] / 2)])]


def _kinds(samples: Sequence[Sample]) -> list[list[int]]:
    """The places of samples of one kind."""
    kinds: dict[Sample, list[int]] = {}
    for place, sample in enumerate(samples):
        kinds.setdefault(replace(sample, seconds=0.0), []).append(place)
    return list(kinds.values())


def _fit_with(
    samples: Sequence[Sample],
    seconds: NDArray[np.float64],
    medians: NDArray[np.float64],
    least_exchange: Mapping[int, float],
    fill_share: float,
) -> Constants:
    """The best constants if a pipeline's further stages cost that share."""
    wide = sorted({sample.degree for sample in samples} - {1})
    columns = 4 + 2 * len(wide)
    features = np.zeros((len(samples), columns))
    for row, sample in enumerate(samples):
        times = sample.times(fill_share)
        tokens, squared = times * sample.tokens / sample.degree, times * sample.tokens_squared / sample.degree
        features[row, :4] = 1.0, times, tokens, squared
        if sample.degree > 1:
            place = 4 + 2 * wide.index(sample.degree)
            features[row, place : place + 2] = times, tokens
    if len(np.unique(features, axis=0)) < columns:
        raise FlexSPError(
            f"{len(np.unique(features, axis=0))} kinds of steps can't tell {columns} constants apart: measure "
            "more of them, with more tokens a rank"
        )
    least = np.zeros(columns)
    for degree, value in least_exchange.items():
        least[4 + 2 * wide.index(degree) + 1] = value
    found = least_absolute_deviations(features / medians[:, None], seconds / medians, least)
    # Where a job is so small that its tokens seem to cost nothing, a share of all that a slice's token takes.
    each = np.median(seconds / features[:, 2])
    floor = _LEAST_SHARE_OF_LINEAR * max(found[2], _LEAST_SHARE_OF_LINEAR * float(each))
    return Constants(
        step=found[0],
        micro_batch=found[1],
        token=found[2],
        token_squared=found[3],
        latency={degree: found[4 + 2 * k] for k, degree in enumerate(wide)},
        exchanged_token={degree: max(found[5 + 2 * k], floor) for k, degree in enumerate(wide)},
        fill_share=fill_share,
    )


def least_absolute_deviations(
    features: NDArray[np.float64], targets: NDArray[np.float64], least: NDArray[np.float64]
) -> list[float]:
    """The x >= least that minimises the sum of |features x - targets|.

    Shapes: features (samples, constants), targets (samples,), least (constants,).

    Raises
    ------
    FlexSPError
        If the linear program has no answer.
    """
    # Every column is brought to the size of 1: raw ones differ by twelve orders of magnitude.
    scales = features.max(axis=0)
    scales[scales == 0] = 1.0
    scaled = features / scales
    program = LinearProgram()
    rows = np.array([program.add_row(target, target) for target in targets - features @ least])
    for column in scaled.T:
        used = np.flatnonzero(column)
        program.add_columns([0.0], [(rows[row], column[row]) for row in used])
    for sign in (1.0, -1.0):
        program.add_columns(np.ones(len(rows)), [(rows, sign)])
    solution = program.solve()
    if solution is None:
        raise FlexSPError("the linear program of the fit has no solution: the measured steps can't be trusted")
    fitted: list[float] = (solution.columns[: features.shape[1]] / scales + least).tolist()
    return fitted


@dataclass(frozen=True)
class Quality:
    """How well constants explain what was measured; samples of one kind by their median."""

    r_squared: float
    median_error: float
    """Median of |predicted / measured - 1| over the kinds of steps."""

    largest_error: float


def quality(constants: Constants, samples: Sequence[Sample]) -> Quality:
    """Compare predictions with the medians of the samples of each kind."""
    kinds = [[samples[place] for place in alike] for alike in _kinds(samples)]
    predicted = np.array([constants.seconds(alike[0]) for alike in kinds])
    measured = np.array([np.median([sample.seconds for sample in alike]) for alike in kinds])
    errors = np.abs(predicted / measured - 1)
    spread = ((measured - measured.mean()) ** 2).sum()
    r_squared = 1 - ((measured - predicted) ** 2).sum() / spread if spread else 1.0
    return Quality(float(r_squared), float(np.median(errors)), float(errors.max()))
