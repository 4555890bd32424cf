"""Lockstep rounds of batches too large to go through all plans."""

from dataclasses import replace

import numpy as np

from megatron_flexsp.planner import CostModel, load_cost_model, plan


def test_rounds_are_all_recomputed_where_that_saves_rounds() -> None:
    # Cheap to recompute, dear to have many rounds: as for parameters that every round gathers.
    cost_model = CostModel(
        memory_budget_bytes=4_000,
        model_state_bytes=0,
        activation_bytes_per_token=1,
        attention_seconds_per_token_squared=1e-9,
        linear_seconds_per_token=1e-4,
        micro_batch_overhead_seconds=0.6,
        exchange_bytes_per_token=1,
        exchange_bandwidth_bytes_per_second={2: 1e4, 4: 1e4, 8: 1e4},
        recomputed_activation_bytes_per_token=1 / 8,
        recompute_share=0.1,
    )
    lengths = np.random.default_rng(0).lognormal(7, 1, 128).astype(np.int64) + 1
    capacity = cost_model.recomputed_token_capacity
    found = plan(lengths, cost_model, 8, schedule="lockstep", recomputed_token_capacity=capacity)
    for other in (cost_model, cost_model.always_recomputed()):
        alone = plan(lengths, other, 8, schedule="lockstep")
        assert found.predicted_seconds <= alone.predicted_seconds * 1.01
    assert found.predicted_seconds <= 1.1 * found.lower_bound_seconds
    found.validate(lengths, cost_model.token_capacity, recomputed_token_capacity=capacity)


def test_degrees_that_do_not_pay_are_left_out() -> None:
    # The whole domain exchanges at once; any group inside of it waits for half a second.
    cost_model = replace(
        load_cost_model("gpt-7b-192k"),
        micro_batch_overhead_seconds=0.05,
        exchange_bandwidth_bytes_per_second=dict.fromkeys((2, 4, 8, 16), 1e11),
        exchange_latency_seconds=dict.fromkeys((2, 4, 8), 0.5),
    )
    lengths = np.random.default_rng(0).lognormal(8, 1, 64).astype(np.int64) + 1
    found = plan(lengths, cost_model, 16, schedule="lockstep")
    without = plan(lengths, cost_model, 16, schedule="lockstep", degrees=(1, 16))
    assert found.predicted_seconds <= without.predicted_seconds * (1 + 1e-9)
