"""Plans: their JSON, their digest and the laws that they keep."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest

from megatron_flexsp.planner import MicroBatch, Plan, PlanError

LENGTHS = [100, 30, 20, 10]


def make_plan(*micro_batches, schedule="nested", domain_size=2):
    items = tuple(MicroBatch(*item) for item in micro_batches)
    return Plan(domain_size, schedule, items, 5.0, 4.0, 0.5, "heuristic")


NESTED = make_plan((0, 2, (0,)), (0, 1, (1,)), (1, 1, (2, 3)))


def test_json_round_trip():
    assert Plan.from_json(NESTED.to_json()) == NESTED
    recomputed = make_plan((0, 1, (0,), True), (1, 1, (1, 2, 3)))
    assert Plan.from_json(recomputed.to_json()) == recomputed


def test_json_is_the_documented_one():
    assert json.loads(NESTED.to_json()) == {
        "schema": "flexsp.plan/1",
        "domain_size": 2,
        "schedule": "nested",
        "micro_batches": [
            {"first_rank": 0, "degree": 2, "sequences": [0]},
            {"first_rank": 0, "degree": 1, "sequences": [1]},
            {"first_rank": 1, "degree": 1, "sequences": [2, 3]},
        ],
        "predicted_seconds": 5.0,
        "lower_bound_seconds": 4.0,
        "solve_seconds": 0.5,
        "status": "heuristic",
    }


def test_digest_is_that_of_what_is_executed():
    assert replace(NESTED, predicted_seconds=1.0, solve_seconds=9.0, status="optimal").digest() == NESTED.digest()
    assert replace(NESTED, schedule="static").digest() != NESTED.digest()
    assert replace(NESTED, domain_size=4).digest() != NESTED.digest()
    assert make_plan((0, 2, (0,)), (1, 1, (1,)), (0, 1, (2, 3))).digest() != NESTED.digest()
    assert make_plan((0, 2, (0,), True), (0, 1, (1,)), (1, 1, (2, 3))).digest() != NESTED.digest()


def test_digest_does_not_change_between_versions():
    assert make_plan((0, 1, (0,)), domain_size=1).digest() == (
        "1f83ae599bed21f6a0fe57c9c5e6ec7a4fd1a364e64311bfc94c565c482a7454"
    )


def test_a_rank_runs_what_its_blocks_run_in_list_order():
    assert [item.sequences for item in NESTED.micro_batches_of_rank(1)] == [(0,), (2, 3)]


@pytest.mark.parametrize(
    "plan",
    [
        NESTED,
        make_plan((0, 1, (0,)), (1, 1, (1, 2, 3)), schedule="static"),
        make_plan((0, 1, (0, 1, 2, 3)), (1, 1, ()), schedule="static"),
        make_plan((0, 2, (0, 1, 2, 3)), (0, 1, ()), (1, 1, ()), schedule="static"),
        make_plan((0, 1, (1,)), (1, 1, (2, 3)), (0, 2, (0,)), schedule="lockstep"),
        make_plan((0, 3, (0,)), (0, 2, (1,)), (2, 1, (2, 3)), domain_size=3),
    ],
)
def test_legal_plans_are_accepted(plan):
    plan.validate(LENGTHS, token_capacity=160)


@pytest.mark.parametrize(
    ("plan", "law"),
    [
        (make_plan((0, 2, (0, 1, 2))), "sequence 3 stands in no micro-batch"),
        (make_plan((0, 2, (0, 1, 2, 3)), (0, 1, (3,))), "sequence 3 stands in more than one place"),
        (make_plan((0, 2, (0, 1, 2, 3, 4))), "holds sequence 4; the global batch has 4"),
        (make_plan((0, 2, (0, 1, 2, -1))), "holds sequence -1"),
        (make_plan((1, 2, (0, 1, 2, 3)), domain_size=4), "no aligned block"),
        (make_plan((0, 3, (0, 1, 2, 3)), domain_size=4), "no aligned block"),
        (make_plan((2, 4, (0, 1, 2, 3)), domain_size=4), "no aligned block"),
        (make_plan((0, 1, (0, 1, 2, 3)), (1, 1, ())), "gives each of its 1 ranks 160 tokens"),
        (make_plan((0, 2, (0, 1, 2, 3)), (0, 2, ())), "filler of degree 2"),
        (make_plan((0, 1, (1,)), (1, 1, (2, 3)), (0, 2, (0,))), "degrees never increase"),
        (make_plan((0, 2, (0,)), (0, 1, (1,)), (1, 1, (2, 3)), schedule="static"), "one degree"),
        (make_plan((0, 2, (0,)), (0, 1, (1, 2, 3)), schedule="lockstep"), "leaves 1 ranks without work"),
        (make_plan((0, 1, (0,)), (0, 2, (1, 2, 3)), schedule="lockstep"), "already busy in lockstep round 0"),
        (make_plan((0, 1, (0,)), (0, 1, (1, 2, 3))), "rank 1 runs no micro-batch"),
        (make_plan((0, 2, (0, 1, 2, 3)), schedule="sideways"), "schedule is 'sideways'"),
    ],
)
def test_rejects_a_plan_that_breaks_a_law(plan, law):
    with pytest.raises(PlanError, match=law):
        plan.validate(LENGTHS, token_capacity=100)


def test_capacity_counts_the_padding_of_slices():
    plan = make_plan((0, 2, (0, 1)))  # 21 tokens: slices of 11, padded to 12
    plan.validate([20, 1], token_capacity=11)
    plan.validate([20, 1], token_capacity=12, slice_multiple=4)
    with pytest.raises(PlanError, match="12 tokens, padding counted; the capacity is 11"):
        plan.validate([20, 1], token_capacity=11, slice_multiple=4)


@pytest.mark.parametrize(
    ("plan", "law"),
    [
        (make_plan((0, 1, (0,), True), (1, 1, (1, 2, 3))), None),
        (make_plan((0, 1, (0,)), (1, 1, (1, 2, 3))), "100 tokens, padding counted; the capacity is 60$"),
        (
            make_plan((0, 2, (0,), True), (0, 1, (1,)), (1, 1, (2, 3))),
            "sequence 0 of 100 tokens, which 2 ranks can hold",
        ),
        (make_plan((0, 1, (0, 3), True), (1, 1, (1, 2))), "sequence 3 of 10 tokens, which 1 ranks can hold without"),
        (make_plan((0, 2, (0, 1, 2, 3), True), (0, 1, ()), (1, 1, ())), None),
        (make_plan((0, 1, (0, 3), True), (1, 1, (1, 2), True)), None),
        (make_plan((0, 1, (0,), True), (1, 1, (1, 2, 3)), (0, 1, (), True)), "fillers are not"),
        (make_plan((0, 1, (0, 3), True), (1, 1, (1, 2), True), (0, 1, (), True)), "fillers are not"),
    ],
)
def test_only_what_fits_in_no_other_way_is_recomputed_or_all_is(plan, law):
    with nullcontext() if law is None else pytest.raises(PlanError, match=law):
        plan.validate(LENGTHS, token_capacity=60, recomputed_token_capacity=120)
    with pytest.raises(PlanError, match="nothing may be"):
        make_plan((0, 1, (0,), True), (1, 1, (1, 2, 3))).validate(LENGTHS, token_capacity=60)
    with pytest.raises(PlanError, match="the capacity is 99, recomputed"):
        make_plan((0, 1, (0,), True), (1, 1, (1, 2, 3))).validate(LENGTHS, 60, recomputed_token_capacity=99)


def test_rejects_counts_that_do_not_fit_the_pipeline():
    with pytest.raises(PlanError, match="rank 0 runs 1 micro-batches; expected a multiple of 2"):
        make_plan((0, 2, (0,))).validate([5], token_capacity=100, count_multiple=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "flexsp.plan/9"}, "schema is 'flexsp.plan/9'"),
        ({"domain_size": "2"}, "domain_size is '2'"),
        ({"domain_size": 0}, "domain_size is 0"),
        ({"schedule": "sideways"}, "schedule is 'sideways'"),
        ({"status": "splendid"}, "status is 'splendid'"),
        ({"micro_batches": {}}, "micro_batches is {}"),
        (
            {"micro_batches": [{"first_rank": 0, "degree": 1, "sequences": [0], "recomputed": 1}]},
            r"micro_batches\[0\].recomputed is 1",
        ),
        ({"micro_batches": [3]}, r"micro_batches\[0\] is 3"),
        ({"micro_batches": [{"first_rank": 0, "degree": 1}]}, r"micro_batches\[0\].sequences is missing"),
        (
            {"micro_batches": [{"first_rank": 0, "degree": 1, "sequences": [0.5]}]},
            r"micro_batches\[0\].sequences holds 0.5",
        ),
    ],
)
def test_rejects_malformed_json(change, message):
    with pytest.raises(PlanError, match=f"^plan.json: {message}"):
        Plan.from_json(json.dumps(json.loads(NESTED.to_json()) | change), source="plan.json")


@pytest.mark.parametrize("text", ["", "{", "[]", '"plan"'])
def test_rejects_what_is_no_plan(text):
    with pytest.raises(PlanError, match=r"^plan: (not JSON|found a JSON)"):
        Plan.from_json(text)
