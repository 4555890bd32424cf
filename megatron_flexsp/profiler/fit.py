"""Seconds of measured steps in, the constants of a cost model out.

Every constant enters a step's seconds linearly, so that the fit is one linear program: least absolute deviations,
each relative to the measured seconds, no constant negative. A run that something disturbed counts as one deviation,
however large, and the fit passes it by as a median would.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner.linear_program import LinearProgram

_LEAST_SHARE_OF_LINEAR = 1e-3
"""An exchange too cheap to be seen still gets this share of a token's compute, so that bandwidths are finite."""


@dataclass(frozen=True)
class Sample:
    """One measured step, all of whose micro-batches are alike."""

    degree: int
    tokens: float
    """Tokens of a pack."""

    tokens_squared: float
    """Sum of its squared lengths."""

    times: float
    """How often a micro-batch's seconds count in the step's: its rounds, and the fill and drain of a pipeline."""

    seconds: float


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

    def seconds(self, sample: Sample) -> float:
        """What they predict for a step; ``sample.seconds`` is not read."""
        work = self.token_squared * sample.tokens_squared + self.token * sample.tokens
        micro_batch = self.micro_batch + work / sample.degree
        if sample.degree > 1:
            exchanged = self.exchanged_token[sample.degree] * sample.tokens / sample.degree
            micro_batch += self.latency[sample.degree] + exchanged
        return self.step + sample.times * micro_batch


def fit(samples: Sequence[Sample], least_exchange: Mapping[int, float] | None = None) -> Constants:
    """The constants that explain the samples best.

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
    wide = sorted({sample.degree for sample in samples} - {1})
    columns = 4 + 2 * len(wide)
    features = np.zeros((len(samples), columns))
    seconds = np.array([sample.seconds for sample in samples])
    if not (np.isfinite(seconds) & (seconds > 0)).all():
        raise FlexSPError("a measured step took no time or no finite time: the clock can't be trusted")
    for row, sample in enumerate(samples):
        features[row, :4] = (
            1.0,
            sample.times,
            sample.times * sample.tokens / sample.degree,
            sample.times * sample.tokens_squared / sample.degree,
        )
        if sample.degree > 1:
            place = 4 + 2 * wide.index(sample.degree)
            features[row, place : place + 2] = sample.times, sample.times * sample.tokens / sample.degree
    if len(np.unique(features, axis=0)) < columns:
        raise FlexSPError(
            f"{len(np.unique(features, axis=0))} kinds of steps can't tell {columns} constants apart: measure "
            "more of them, with more tokens a rank"
        )
    least = np.zeros(columns)
    for degree, value in (least_exchange or {}).items():
        least[4 + 2 * wide.index(degree) + 1] = value
    found = least_absolute_deviations(features / seconds[:, None], np.ones(len(samples)), least)
    # Where a job is so small that its tokens seem to cost nothing, a share of all that a slice's token takes.
    each = np.median(seconds / np.array([sample.times * sample.tokens / sample.degree for sample in samples]))
    floor = _LEAST_SHARE_OF_LINEAR * max(found[2], _LEAST_SHARE_OF_LINEAR * float(each))
    return Constants(
        step=found[0],
        micro_batch=found[1],
        token=found[2],
        token_squared=found[3],
        latency={degree: found[4 + 2 * k] for k, degree in enumerate(wide)},
        exchanged_token={degree: max(found[5 + 2 * k], floor) for k, degree in enumerate(wide)},
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
    kinds: dict[tuple[float, ...], list[Sample]] = {}
    for sample in samples:
        kinds.setdefault((sample.degree, sample.tokens, sample.tokens_squared, sample.times), []).append(sample)
    predicted = np.array([constants.seconds(alike[0]) for alike in kinds.values()])
    measured = np.array([np.median([sample.seconds for sample in alike]) for alike in kinds.values()])
    errors = np.abs(predicted / measured - 1)
    spread = ((measured - measured.mean()) ** 2).sum()
    r_squared = 1 - ((measured - predicted) ** 2).sum() / spread if spread else 1.0
    return Quality(float(r_squared), float(np.median(errors)), float(errors.max()))
