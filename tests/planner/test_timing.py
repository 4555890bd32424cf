"""Hand-checked step times, balance and padding. In the simple model a token takes 2 ranks 1.5 s, 1 rank 1 s."""

from dataclasses import replace

import pytest

from megatron_flexsp.planner import (
    MicroBatch,
    Plan,
    balance,
    micro_batch_seconds,
    padding_share,
    step_seconds,
)


def make_plan(schedule, *micro_batches):
    items = tuple(MicroBatch(*item) for item in micro_batches)
    return Plan(2, schedule, items, 0.0, 0.0, 0.0, "heuristic")


LENGTHS = [20, 30, 10, 5]


def test_nested_step_is_the_longest_path(simple_model):
    plan = make_plan("nested", (0, 2, (0,)), (0, 1, (1,)), (1, 1, (2, 3)))
    assert micro_batch_seconds(plan, LENGTHS, simple_model).tolist() == [40, 40, 25]
    assert step_seconds(plan, LENGTHS, simple_model) == 80
    assert balance(plan, LENGTHS, simple_model) == pytest.approx((2 * 40 + 40 + 25) / (2 * 80))


def test_lockstep_step_is_the_sum_of_the_slowest_groups(simple_model):
    rounds = ((0, 1, (0,)), (1, 1, (1,)), (0, 1, (2,)), (1, 1, ()), (0, 1, ()), (1, 1, (3,)))
    plan = make_plan("lockstep", *rounds)
    assert step_seconds(plan, LENGTHS, simple_model) == 40 + 20 + 15


@pytest.mark.parametrize("schedule", ["nested", "lockstep"])
def test_fill_and_drain_count_by_what_further_stages_add(simple_model, schedule):
    plan = make_plan(schedule, (0, 1, (0,)), (1, 1, (1,)), (0, 1, (2,)), (1, 1, (3,)))
    alone = step_seconds(plan, LENGTHS, simple_model)
    assert step_seconds(plan, LENGTHS, simple_model, pipeline_stages=3) == alone + 2 * 40
    faster = replace(simple_model, pipeline_fill_share=0.25)
    assert step_seconds(plan, LENGTHS, faster, pipeline_stages=3) == alone + 0.25 * 2 * 40
    assert step_seconds(plan, LENGTHS, faster) == alone


def test_a_group_waits_for_its_last_rank(simple_model):
    plan = make_plan("static", (0, 1, (2,)), (1, 1, (3,)), (0, 2, (0,)))
    assert step_seconds(plan, LENGTHS, simple_model) == 20 + 40


def test_latency_counts_once_per_micro_batch(simple_model):
    plan = Plan(4, "nested", (MicroBatch(0, 4, (2, 3)),), 0.0, 0.0, 0.0, "heuristic")
    assert step_seconds(plan, LENGTHS, simple_model) == simple_model.micro_batch_seconds([10, 5], 4)


def test_fillers_cost_overhead_but_are_no_work(simple_model):
    plan = make_plan("static", (0, 1, (2,)), (1, 1, ()))
    assert micro_batch_seconds(plan, [0, 0, 10], simple_model).tolist() == [20, 10]
    assert balance(plan, [0, 0, 10], simple_model) == 0.5


def test_padding_share_counts_slices_and_fillers():
    plan = make_plan("nested", (0, 2, (0,)), (0, 1, (1,)), (1, 1, ()))
    # Slices of 3, padded to 4, on two ranks; 7 padded to 8; a filler of 4.
    assert padding_share(plan, [5, 7], slice_multiple=4) == pytest.approx(1 - 12 / 20)
    assert padding_share(make_plan("nested", (0, 2, (0,))), [6]) == 0
