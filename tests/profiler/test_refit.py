"""A cost model refitted to steps that took something else than it said."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_flexsp.megatron.autotune import Autotune
from megatron_flexsp.planner import CostModel, load_cost_model, plan, step_seconds
from megatron_flexsp.profiler.refit import TimedStep, refit, timed_step

MODEL = replace(load_cost_model("gpt-7b-192k"), step_overhead_seconds=0.3)
TRUE = replace(
    MODEL,
    step_overhead_seconds=0.5,
    micro_batch_overhead_seconds=1.2 * MODEL.micro_batch_overhead_seconds,
    attention_seconds_per_token_squared=1.4 * MODEL.attention_seconds_per_token_squared,
    linear_seconds_per_token=1.4 * MODEL.linear_seconds_per_token,
    exchange_bandwidth_bytes_per_second={
        degree: value / 2 for degree, value in MODEL.exchange_bandwidth_bytes_per_second.items()
    },
)


def steps_under(true: CostModel, count: int) -> list[TimedStep]:
    """Batches that are planned under the model and take what the true one says; every tenth is disturbed."""
    generator = np.random.default_rng(3)
    found = []
    for number in range(count):
        lengths = np.clip(generator.lognormal(7 + number % 3 / 2, 1.3, 60).astype(int), 1, 40_000)
        made = plan(lengths, MODEL, 8, time_limit_seconds=0)
        seconds = step_seconds(made, lengths, true) + true.step_overhead_seconds
        seconds *= 5.0 if number % 10 == 7 else generator.normal(1, 0.01)
        found.append(timed_step(made, lengths, MODEL, 1, seconds))
    return found


def test_the_true_constants_come_out_of_disturbed_steps() -> None:
    found = refit(MODEL, steps_under(TRUE, 60))
    assert found.median_error_before > 0.15
    assert found.median_error_after < 0.02
    assert found.compute_scale == pytest.approx(1.4, rel=0.1)
    assert found.exchange_scale == pytest.approx(2.0, rel=0.35)
    bandwidth = found.cost_model.exchange_bandwidth_bytes_per_second[8]
    assert bandwidth == pytest.approx(MODEL.exchange_bandwidth_bytes_per_second[8] / found.exchange_scale)
    assert found.cost_model.token_capacity == MODEL.token_capacity


def test_a_model_that_is_right_stays() -> None:
    found = refit(MODEL, steps_under(MODEL, 30))
    assert found.compute_scale == pytest.approx(1.0, abs=0.03)
    assert found.cost_model.micro_batch_overhead_seconds == pytest.approx(MODEL.micro_batch_overhead_seconds, rel=0.03)


def test_what_steps_can_not_tell_stays_as_it_was() -> None:
    """No group of several ranks was used: nothing is known about the exchange."""
    alike = [TimedStep(micro_batches=2, compute_seconds=1.0, exchange_seconds=0.0, seconds=3.0)] * 20
    found = refit(MODEL, alike)
    assert found.exchange_scale == 1.0
    assert found.median_error_after < 0.01


def test_autotune_waits_for_twenty_steps_and_hands_the_model_on() -> None:
    now, used, told = [0.0], [], []
    lengths = np.array([3000, 500, 700, 9000])
    made = plan(lengths, MODEL, 8)
    took = 1.5 * (step_seconds(made, lengths, MODEL) + MODEL.step_overhead_seconds)
    tuned = Autotune(MODEL, 1, used.append, told.append, submit=lambda call: call(), clock=lambda: now[0])
    for number in range(25):
        tuned.begin_step(made, lengths)
        assert len(told) == (number >= 23)  # three warm up, twenty count
        now[0] += took
    assert "median error of the prediction 33.3% -> 0.0%" in told[0]
    predicted = step_seconds(made, lengths, used[0]) + used[0].step_overhead_seconds
    assert predicted == pytest.approx(took, rel=1e-3)
