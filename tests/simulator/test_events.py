"""Plans on paper: against the planner's own formula, against what is known of pipelines, and slowed down."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_flexsp.planner import CostModel, MicroBatch, Plan, micro_batch_seconds, plan, step_seconds
from megatron_flexsp.simulator import simulate as simulate_seconds
from megatron_flexsp.trace_format import Kind

COSTS = CostModel(
    memory_budget_bytes=1000,
    model_state_bytes=0,
    activation_bytes_per_token=1,
    attention_seconds_per_token_squared=1e-6,
    linear_seconds_per_token=1e-3,
    micro_batch_overhead_seconds=0.1,
    exchange_bytes_per_token=1,
    exchange_bandwidth_bytes_per_second={2: 4000, 4: 2000, 8: 500},
)


def simulate(made, lengths, cost_model, **options):
    return simulate_seconds(made, micro_batch_seconds(made, lengths, cost_model), **options)


def plan_of(*micro_batches, schedule="nested", domain_size=2):
    items = tuple(MicroBatch(first, degree, sequences) for first, degree, sequences in micro_batches)
    return Plan(domain_size, schedule, items, 1.0, 1.0, 0.0, "feasible")


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 2000), min_size=1, max_size=40),
    domain_size=st.sampled_from([1, 4, 6, 8]),
    schedule=st.sampled_from(["nested", "lockstep", "static"]),
)
def test_a_step_takes_what_the_planner_says(lengths, domain_size, schedule):
    lengths = np.minimum(lengths, 1000 if domain_size == 1 else 2000)
    made = plan(lengths, COSTS, domain_size, schedule=schedule, time_limit_seconds=0)
    timeline = simulate(made, lengths, COSTS)
    assert timeline.step_seconds == pytest.approx(step_seconds(made, lengths, COSTS))
    assert 0 < timeline.busy_share <= 1 + 1e-9


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 2000), min_size=1, max_size=30),
    stages=st.integers(2, 4),
    schedule=st.sampled_from(["nested", "lockstep", "static"]),
)
def test_a_pipeline_runs_every_pass_once_and_no_rank_does_two_things_at_once(lengths, stages, schedule):
    made = plan(lengths, COSTS, 4, schedule=schedule, time_limit_seconds=0, pipeline_stages=stages)
    timeline = simulate(made, lengths, COSTS, pipeline_stages=stages)
    runs = [(item.micro_batch, item.stage, item.kind) for item in timeline.operations]
    assert len(set(runs)) == len(runs) == 2 * stages * len(made.micro_batches)
    for rank in range(4):
        for stage in range(stages):
            mine = [item for item in timeline.operations if rank in item.ranks and item.stage == stage]
            mine.sort(key=lambda item: (item.start_seconds, item.end_seconds))
            for before, after in pairwise(mine):
                assert before.end_seconds <= after.start_seconds + 1e-9
    ends = {(item.micro_batch, item.stage, item.kind): item.end_seconds for item in timeline.operations}
    starts = {(item.micro_batch, item.stage, item.kind): item.start_seconds for item in timeline.operations}
    for index in range(len(made.micro_batches)):
        for stage in range(1, stages):
            assert ends[index, stage - 1, Kind.FORWARD] <= starts[index, stage, Kind.FORWARD] + 1e-9
            assert ends[index, stage, Kind.BACKWARD] <= starts[index, stage - 1, Kind.BACKWARD] + 1e-9


@pytest.mark.parametrize(("count", "stages"), [(1, 4), (3, 4), (4, 2), (9, 3)])
def test_equal_micro_batches_fill_and_drain_a_pipeline_once(count, stages):
    """1F1B: (micro-batches + stages - 1) times one micro-batch (Narayanan et al., arXiv 2104.04473, section 2.2)."""
    made = plan_of(*[(0, 1, (index,)) for index in range(count)], domain_size=1)
    timeline = simulate(made, [500] * count, COSTS, pipeline_stages=stages)
    one = 0.1 + 1e-6 * 500**2 + 1e-3 * 500
    assert timeline.step_seconds == pytest.approx((count + stages - 1) * one)
    assert timeline.busy_share == pytest.approx(count / (count + stages - 1))


@pytest.mark.parametrize("schedule", ["nested", "lockstep"])
def test_a_recomputed_micro_batch_runs_its_forward_pass_again_in_its_backward_pass(schedule):
    kept = plan_of((0, 1, (0,)), domain_size=1, schedule=schedule)
    recomputed = replace(kept, micro_batches=(replace(kept.micro_batches[0], recomputed=True),))
    passes = [simulate(made, [500], COSTS, pipeline_stages=2).operations for made in (kept, recomputed)]
    for before, after in zip(*passes, strict=True):
        took, takes = (item.end_seconds - item.start_seconds for item in (before, after))
        assert takes == pytest.approx(took * (1.5 if before.kind is Kind.BACKWARD else 1))


def test_a_slow_rank_holds_up_its_group_and_nobody_else():
    made = plan_of((0, 2, (0,)), (2, 2, (1,)), (0, 1, (2,)), (1, 1, (3,)), (2, 1, (4,)), (3, 1, (5,)), domain_size=4)
    lengths = [600, 600, 300, 300, 300, 300]
    even = {item.micro_batch: item for item in simulate(made, lengths, COSTS).operations}
    slowed = {item.micro_batch: item for item in simulate(made, lengths, COSTS, slowdowns=[1, 2, 1, 1]).operations}
    wide, narrow = even[0].end_seconds, even[2].end_seconds - even[2].start_seconds
    assert slowed[0].end_seconds == pytest.approx(2 * wide)
    assert slowed[2].end_seconds == pytest.approx(2 * wide + narrow)
    assert slowed[3].end_seconds == pytest.approx(2 * wide + 2 * narrow)
    assert [slowed[index] for index in (1, 4, 5)] == [even[index] for index in (1, 4, 5)]


def test_in_lockstep_a_slow_rank_holds_up_everybody():
    made = plan_of((0, 1, (0,)), (1, 1, (1,)), (0, 1, (2,)), (1, 1, (3,)), schedule="lockstep")
    one = simulate(made, [300] * 4, COSTS).step_seconds / 2
    slowed = simulate(made, [300] * 4, COSTS, slowdowns=[3, 1])
    assert slowed.step_seconds == pytest.approx(6 * one)
    assert slowed.busy_share == pytest.approx((1 + 1 / 3) / 2)


def test_fillers_and_the_reduction_are_not_busy():
    made = plan_of((0, 1, (0,)), (1, 1, ()))
    timeline = simulate(made, [400], COSTS, reduction_seconds=0.5)
    one = 0.1 + 1e-6 * 400**2 + 1e-3 * 400
    assert timeline.step_seconds == pytest.approx(one + 0.5)
    assert timeline.busy_share == pytest.approx(one / (2 * (one + 0.5)))
