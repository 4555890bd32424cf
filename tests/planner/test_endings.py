"""No rank begins to reduce gradients while it still exchanges with a rank that has more to run."""

import numpy as np
import pytest

from megatron_flexsp.planner import CostModel, MicroBatch, Plan, PlanError, plan, step_seconds

COST_MODEL = CostModel(
    memory_budget_bytes=1e9,
    model_state_bytes=0,
    activation_bytes_per_token=1e6,
    attention_seconds_per_token_squared=1e-8,
    linear_seconds_per_token=1e-4,
    micro_batch_overhead_seconds=0.01,
    exchange_bytes_per_token=1000,
    exchange_bandwidth_bytes_per_second={2: 1e9, 4: 1e9, 8: 1e8},
)


def nested(*micro_batches: MicroBatch, domain_size: int = 2) -> Plan:
    return Plan(domain_size, "nested", micro_batches, 1.0, 1.0, 0.0, "heuristic")


SHARED, ALONE, FILLER = MicroBatch(0, 2, (0,)), MicroBatch(1, 1, (1,)), MicroBatch(0, 1, ())


def test_rejects_a_rank_whose_partner_goes_on() -> None:
    with pytest.raises(PlanError, match="rank 0 ends with a micro-batch that it shares"):
        nested(SHARED, ALONE).validate([10, 10], 100)


def test_a_filler_at_the_end_is_enough_and_costs_nothing() -> None:
    nested(SHARED, ALONE, FILLER).validate([10, 10], 100)
    seconds = step_seconds(nested(SHARED, ALONE), [10, 10], COST_MODEL)
    assert step_seconds(nested(SHARED, ALONE, FILLER), [10, 10], COST_MODEL) == seconds


def test_partners_that_end_together_need_none() -> None:
    nested(SHARED, MicroBatch(0, 2, (1,))).validate([10, 10], 100)


def test_interleaved_pipelines_need_as_many_as_their_multiple() -> None:
    both, goes_on = [MicroBatch(0, 2, (0,)), MicroBatch(0, 2, (1,))], [MicroBatch(1, 1, (2,)), MicroBatch(1, 1, (3,))]
    nested(*both, *goes_on, FILLER, FILLER).validate([10] * 4, 100, count_multiple=2)
    with pytest.raises(PlanError, match="rank 0"):
        nested(*both, *goes_on).validate([10] * 4, 100, count_multiple=2)


@pytest.mark.parametrize("count_multiple", [1, 2, 3])
def test_every_plan_ends_so(count_multiple: int) -> None:
    generator = np.random.default_rng(count_multiple)
    with_fillers = 0
    for _ in range(60):
        lengths = np.clip(generator.lognormal(6, 2, generator.integers(8, 20)), 1, 6000).astype(int)
        made = plan(lengths, COST_MODEL, 8, count_multiple=count_multiple)
        made.validate(lengths, COST_MODEL.token_capacity, count_multiple=count_multiple)
        with_fillers += any(item.is_filler for item in made.micro_batches)
    assert with_fillers
