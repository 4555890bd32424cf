"""Refit a cost model to the steps of the job that uses it.

A step's seconds are linear in the overhead of a step and of a micro-batch, and in how much faster or slower compute and
exchange are than the model says. Those four are fitted; the relation of attention to the rest, and of one degree's
bandwidth to another's, stays as measured: a job's own steps vary too little to tell those apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_flexsp.planner import CostModel, Plan, step_seconds
from megatron_flexsp.profiler.fit import least_absolute_deviations

_PROBE = 1e-3
"""By which a constant is changed to see how often it counts on the path that ends last; too little for another path."""

_LEAST = np.array([0.0, 0.0, 0.05, 0.05])
"""Overheads may vanish; neither compute nor exchange becomes free."""

_PRIOR_STEPS = 4
"""The model that a job began with counts as so many steps: what its steps can't tell stays as it was."""


@dataclass(frozen=True)
class TimedStep:
    """A step that was run, taken apart by the model that the job began with."""

    micro_batches: float
    """How often a micro-batch's overhead counts."""

    compute_seconds: float
    exchange_seconds: float
    seconds: float
    """What it took."""


@dataclass(frozen=True)
class Refit:
    """What was found."""

    cost_model: CostModel
    compute_scale: float
    exchange_scale: float
    median_error_before: float
    """Median of |predicted / measured - 1| under the model that the job began with."""

    median_error_after: float


def timed_step(
    plan: Plan, lengths: NDArray[np.int64], model: CostModel, pipeline_stages: int, seconds: float
) -> TimedStep:
    """Take a step apart: what counts how often on the path that ends last.

    Parameters
    ----------
    plan, lengths
        What was run; lengths in tokens, shape (sequences,).
    model
        The cost model that the job began with.
    pipeline_stages
        Stages whose fill and drain count.
    seconds
        What the step took.
    """

    def predicted(of: CostModel) -> float:
        return step_seconds(plan, lengths, of, pipeline_stages=pipeline_stages)

    total = predicted(model)
    probe = _PROBE * max(model.micro_batch_overhead_seconds, total / max(1, len(plan.micro_batches)))
    overhead = model.micro_batch_overhead_seconds
    micro_batches = (predicted(replace(model, micro_batch_overhead_seconds=overhead + probe)) - total) / probe
    exchange_seconds = (predicted(_scaled(model, 1.0, 1.0 + _PROBE)) - total) / _PROBE
    compute_seconds = max(0.0, total - micro_batches * overhead - exchange_seconds)
    return TimedStep(micro_batches, compute_seconds, exchange_seconds, seconds)


def refit(model: CostModel, steps: Sequence[TimedStep]) -> Refit:
    """The model that explains the steps best, in the sense of least absolute deviations.

    A step that something disturbed, such as one with a checkpoint in it, counts as one deviation, however large.

    Parameters
    ----------
    model
        The cost model that the job began with.
    steps
        At least one.
    """
    features = np.array([[1.0, step.micro_batches, step.compute_seconds, step.exchange_seconds] for step in steps])
    seconds = np.array([step.seconds for step in steps])
    began_with = np.array([model.step_overhead_seconds, model.micro_batch_overhead_seconds, 1.0, 1.0])
    # What the job began with enters as steps of each constant's usual part alone, found as expected.
    usual = np.diag(np.median(features, axis=0)) / np.median(seconds)
    rows = np.concatenate([features / seconds[:, None], *[usual] * _PRIOR_STEPS])
    targets = np.concatenate([np.ones(len(steps)), *[usual @ began_with] * _PRIOR_STEPS])
    found = np.array(least_absolute_deviations(rows, targets, _LEAST))
    found = np.where(features.any(axis=0), found, began_with)
    return Refit(
        replace(
            _scaled(model, float(found[2]), float(found[3])),
            step_overhead_seconds=float(found[0]),
            micro_batch_overhead_seconds=float(found[1]),
        ),
        compute_scale=float(found[2]),
        exchange_scale=float(found[3]),
        median_error_before=float(np.median(np.abs(features @ began_with / seconds - 1))),
        median_error_after=float(np.median(np.abs(features @ found / seconds - 1))),
    )


def _scaled(model: CostModel, compute: float, exchange: float) -> CostModel:
    """The model with compute and exchange so many times as slow."""
    bandwidth, latency = model.exchange_bandwidth_bytes_per_second, model.exchange_latency_seconds
    return replace(
        model,
        attention_seconds_per_token_squared=compute * model.attention_seconds_per_token_squared,
        linear_seconds_per_token=compute * model.linear_seconds_per_token,
        exchange_bandwidth_bytes_per_second={degree: value / exchange for degree, value in bandwidth.items()},
        exchange_latency_seconds={degree: value * exchange for degree, value in latency.items()},
    )
