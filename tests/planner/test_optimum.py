"""On tiny batches the planner finds the optimum, and no bound lies above it."""

import math

import numpy as np
import pytest

from megatron_flexsp.planner import CostModel, legal_degrees, plan
from megatron_flexsp.planner.bounds import lockstep_bound_seconds, simple_bound_seconds
from megatron_flexsp.planner.nested_bound import nested_bound_seconds
from megatron_flexsp.planner.problem import make_problem
from megatron_flexsp.planner.recomputing import degrees_of_recomputed
from tests.planner.brute_force import best_seconds

INSTANCES = 150


def draw_instance(generator, recompute_share=None):
    """Lengths, a cost model and settings, small enough for brute force.

    With a share, packs may be recomputed and sequences are up to three times as long as fits without.
    """
    domain_size = int(generator.choice([1, 2, 3, 4]))
    capacity = int(generator.integers(5, 60))
    legal = legal_degrees(domain_size)
    degrees = [d for d in legal if d == legal[-1] or generator.random() < 0.8]
    longest = max(degrees) * capacity * (1 if recompute_share is None else 3)
    count = int(generator.integers(1, 5))
    lengths = [int(n) for n in np.clip(generator.lognormal(np.log(capacity * 0.6), 0.9, count), 1, longest)]

    def seconds(share):
        return float(generator.choice([0.0, generator.uniform(0, share)]))

    cost_model = CostModel(
        memory_budget_bytes=capacity,
        model_state_bytes=0,
        activation_bytes_per_token=1,
        attention_seconds_per_token_squared=seconds(0.02),
        linear_seconds_per_token=seconds(1.0),
        micro_batch_overhead_seconds=seconds(30.0),
        exchange_bytes_per_token=1,
        exchange_bandwidth_bytes_per_second={d: float(generator.uniform(0.5, 20)) for d in legal if d > 1},
        exchange_latency_seconds={d: seconds(5.0) for d in legal if d > 1},
        recompute_share=1 / 3 if recompute_share is None else recompute_share,
    )
    settings = {
        "count_multiple": int(generator.choice([1, 1, 1, 2])),
        "pipeline_stages": int(generator.choice([1, 1, 1, 2, 4])),
    }
    return lengths, cost_model, domain_size, degrees, settings


@pytest.mark.parametrize("schedule", ["nested", "lockstep"])
@pytest.mark.parametrize("seed", range(INSTANCES))
def test_plan_is_the_optimum_and_no_bound_is_above_it(schedule, seed):
    lengths, cost_model, domain_size, degrees, settings = draw_instance(np.random.default_rng(seed))
    capacity = cost_model.token_capacity
    optimum = best_seconds(schedule, lengths, cost_model, domain_size, capacity=capacity, degrees=degrees, **settings)
    found = plan(lengths, cost_model, domain_size, schedule=schedule, degrees=degrees, **settings)
    found.validate(lengths, capacity, count_multiple=settings["count_multiple"])
    assert found.predicted_seconds == pytest.approx(optimum, rel=1e-9)
    assert found.lower_bound_seconds <= optimum * (1 + 1e-12)

    problem = make_problem(lengths, cost_model, domain_size, degrees=degrees, **settings)
    bound = lockstep_bound_seconds if schedule == "lockstep" else nested_bound_seconds
    assert simple_bound_seconds(problem) <= optimum * (1 + 1e-9)
    assert bound(problem) <= optimum * (1 + 1e-12)


@pytest.mark.parametrize("schedule", ["nested", "lockstep"])
@pytest.mark.parametrize("seed", range(INSTANCES))
def test_plan_that_may_recompute_is_the_optimum_and_no_bound_is_above_it(schedule, seed):
    generator = np.random.default_rng(1_000 + seed)
    share = float(generator.choice([0.0, 1 / 3, 1.0]))
    lengths, cost_model, domain_size, degrees, settings = draw_instance(generator, share)
    capacity = cost_model.token_capacity
    recomputed_capacity = 3 * capacity
    optimum = best_seconds(
        schedule,
        lengths,
        cost_model,
        domain_size,
        capacity=capacity,
        recomputed_capacity=recomputed_capacity,
        degrees=degrees,
        **settings,
    )
    settings["recomputed_token_capacity"] = recomputed_capacity
    found = plan(lengths, cost_model, domain_size, schedule=schedule, degrees=degrees, **settings)
    found.validate(
        lengths,
        capacity,
        recomputed_token_capacity=recomputed_capacity,
        count_multiple=settings["count_multiple"],
    )
    assert found.predicted_seconds == pytest.approx(optimum, rel=1e-9)
    assert found.lower_bound_seconds <= optimum * (1 + 1e-12)
    problem = make_problem(lengths, cost_model, domain_size, degrees=degrees, **settings)
    if schedule == "lockstep":
        bound = lockstep_bound_seconds(problem)
    else:  # only what must be is recomputed, or all is
        bound = min(nested_bound_seconds(problem), nested_bound_seconds(problem.recomputing))
    assert bound <= optimum * (1 + 1e-12)


def test_fillers_that_ranks_must_end_with_are_not_taken_for_unavoidable():
    # Interleaved: rank 0 runs 59 and 30, rank 1 runs 59, 16 and 16; rank 0 ends with two fillers more, and last.
    cost_model = CostModel(
        memory_budget_bytes=30,
        model_state_bytes=0,
        activation_bytes_per_token=1,
        attention_seconds_per_token_squared=1,
        linear_seconds_per_token=0,
        micro_batch_overhead_seconds=100,
        exchange_bytes_per_token=0,
        exchange_bandwidth_bytes_per_second={2: 1.0},
    )
    lengths = [59, 30, 16, 16]
    found = plan(lengths, cost_model, 2, count_multiple=2)
    optimum = best_seconds("nested", lengths, cost_model, 2, capacity=30, degrees=(1, 2), count_multiple=2)
    assert found.lower_bound_seconds == pytest.approx(optimum, rel=1e-9)
    assert found.predicted_seconds > optimum
    assert found.status == "feasible"


@pytest.mark.filterwarnings("error")
def test_recomputing_that_costs_nothing_and_is_a_last_resort():
    free = CostModel(
        memory_budget_bytes=10,
        model_state_bytes=0,
        activation_bytes_per_token=1,
        attention_seconds_per_token_squared=0,
        linear_seconds_per_token=0,
        micro_batch_overhead_seconds=0,
        exchange_bytes_per_token=0,
        exchange_bandwidth_bytes_per_second={2: 1.0},
    )
    problem = make_problem([15, 25], free, 2, recomputed_token_capacity=30)
    assert degrees_of_recomputed(problem, math.inf, math.inf, price=math.inf) == {1: 1}
