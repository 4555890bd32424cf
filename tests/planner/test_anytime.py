"""Time limits, seeds and degenerate batches, for every schedule."""

import time
from dataclasses import replace

import numpy as np
import pytest

from megatron_flexsp.planner import CostModel, load_cost_model, plan
from megatron_flexsp.planner.bounds import lockstep_bound_seconds
from megatron_flexsp.planner.problem import make_problem

SCHEDULES = ["nested", "lockstep", "static", "batch-adaptive"]


@pytest.fixture(scope="module")
def model():
    return load_cost_model("gpt-7b-192k")


def lognormal(count, median=700, sigma=1.5, seed=0):
    return np.clip(np.random.default_rng(seed).lognormal(np.log(median), sigma, count).astype(int), 1, 190_000)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_time_still_gives_a_legal_plan(model, schedule):
    lengths = lognormal(512)
    made = plan(lengths, model, 64, schedule=schedule, time_limit_seconds=0)
    made.validate(lengths, model.token_capacity)
    assert made.status in ("heuristic", "optimal")
    assert made.lower_bound_seconds <= made.predicted_seconds


@pytest.mark.parametrize("schedule", ["nested", "lockstep"])
def test_time_limit_is_kept(model, schedule):
    lengths = lognormal(4096)
    limit_seconds = 0.6
    started = time.process_time()  # which other programs don't lengthen
    plan(lengths, model, 256, schedule=schedule, time_limit_seconds=limit_seconds, degrees=[1, 2, 4, 8, 16, 32, 64])
    assert time.process_time() - started < 1.5 * limit_seconds


@pytest.mark.parametrize("limit_seconds", [0, 0.3])
def test_time_limit_is_kept_where_few_ranks_run_hundreds_of_rounds(model, limit_seconds):
    lengths = lognormal(4096, median=600, sigma=1.0).clip(max=8192)
    started = time.process_time()
    made = plan(
        lengths, model, 4, schedule="lockstep", token_capacity=4096, degrees=[1, 2], time_limit_seconds=limit_seconds
    )
    assert time.process_time() - started < 0.2 + 1.5 * limit_seconds
    made.validate(lengths, 4096)
    assert len(made.micro_batches_of_rank(0)) > 200


def test_hundreds_of_rounds_take_no_longer_without_a_limit_than_other_batches(model):
    lengths = lognormal(1024, median=600, sigma=1.0).clip(max=8192)
    started = time.process_time()
    made = plan(lengths, model, 2, schedule="lockstep", token_capacity=4096)
    assert time.process_time() - started < 10  # once 83 s
    made.validate(lengths, 4096)
    assert made.predicted_seconds <= 1.05 * made.lower_bound_seconds


@pytest.mark.parametrize("pipeline_stages", [1, 4, 16])
def test_the_lockstep_bound_takes_no_time_where_any_number_of_rounds_may_be_best(model, pipeline_stages):
    # Next to no overhead: thousands of rounds cost hardly more than a few, and drain a pipeline sooner.
    cheap = replace(model, micro_batch_overhead_seconds=1e-3)
    problem = make_problem(np.arange(100, 8292), cheap, 512, pipeline_stages=pipeline_stages)
    started = time.process_time()
    lockstep_bound_seconds(problem)
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_seeds_repeat(model, schedule):
    lengths = lognormal(200)
    digests = {plan(lengths, model, 16, schedule=schedule, seed=7, degrees=[16, 8, 4, 2]).digest() for _ in range(2)}
    assert len(digests) == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_longer_search_is_no_worse(model, schedule):
    lengths = lognormal(256, seed=3, median=1600, sigma=1.0)
    first = plan(lengths, model, 32, schedule=schedule, time_limit_seconds=0)
    assert plan(lengths, model, 32, schedule=schedule).predicted_seconds <= first.predicted_seconds


DOMAINS = [1, 6, 12, 48]
BATCHES = {
    "one sequence": [3000],
    "fewer sequences than ranks": [900, 4000, 20],
    "all equal": [2000] * 60,
    "all as long as can be but one": None,
}


@pytest.mark.parametrize("schedule", ["nested", "lockstep"])
@pytest.mark.parametrize("domain_size", DOMAINS)
@pytest.mark.parametrize("batch", BATCHES)
def test_degenerate_batches(model, schedule, domain_size, batch):
    widest = max(degree for degree in (1, 2, 4, 8, 16, 32) if degree <= domain_size)
    lengths = BATCHES[batch] or [model.token_capacity * widest] * 5 + [1]
    made = plan(lengths, model, domain_size, schedule=schedule)
    made.validate(lengths, model.token_capacity)
    assert made.lower_bound_seconds <= made.predicted_seconds


@pytest.mark.parametrize("schedule", ["nested", "lockstep"])
def test_a_hundred_thousand_sequences(model, schedule):
    lengths = lognormal(100_000, median=300, sigma=1.0)
    made = plan(lengths, model, 48, schedule=schedule, time_limit_seconds=0)
    made.validate(lengths, model.token_capacity)


def test_pipelines_prefer_more_and_shorter_micro_batches():
    model = CostModel(
        memory_budget_bytes=1000,
        model_state_bytes=0,
        activation_bytes_per_token=1,
        attention_seconds_per_token_squared=0,
        linear_seconds_per_token=1,
        micro_batch_overhead_seconds=1,
        exchange_bytes_per_token=0,
        exchange_bandwidth_bytes_per_second={},
    )
    for schedule in ("nested", "lockstep"):
        alone = plan([10] * 8, model, 1, schedule=schedule)
        piped = plan([10] * 8, model, 1, schedule=schedule, pipeline_stages=4)
        assert len(alone.micro_batches) == 1
        # Eight of 11 s: 88 + 3 x 11; four of 21 s would take 84 + 3 x 21.
        assert len(piped.micro_batches) == 8
        assert piped.predicted_seconds == pytest.approx(121)
        assert piped.status == "optimal"
