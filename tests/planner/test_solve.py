"""What ``plan`` finds and what it refuses, on batches small enough to check by hand."""

import time
from dataclasses import replace

import numpy as np
import pytest

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner import CostModel, MicroBatch, legal_degrees, load_cost_model, plan


def test_one_sequence_that_fits_one_rank(simple_model):
    found = plan([50], simple_model, domain_size=2)
    assert found.micro_batches == (MicroBatch(0, 1, (0,)), MicroBatch(1, 1, ()))
    assert found.predicted_seconds == 60


@pytest.mark.parametrize("schedule", ["nested", "static", "batch-adaptive"])
@pytest.mark.parametrize(("overhead_seconds", "all_again"), [(10, False), (100, True)])
def test_all_is_recomputed_where_fewer_micro_batches_save_more(simple_model, schedule, overhead_seconds, all_again):
    # Kept, twelve packs of 100 tokens, six on each rank; recomputed, four of 300, two on each.
    cost_model = replace(simple_model, micro_batch_overhead_seconds=overhead_seconds)
    found = plan([50] * 24, cost_model, 2, schedule=schedule, recomputed_token_capacity=300)
    found.validate([50] * 24, 100, recomputed_token_capacity=300)
    assert {item.recomputed for item in found.micro_batches} == {all_again}
    kept, recomputed = 6 * (overhead_seconds + 100), 4 / 3 * 2 * (overhead_seconds + 300)
    assert found.predicted_seconds == pytest.approx(min(kept, recomputed))
    assert found.lower_bound_seconds == pytest.approx(min(kept, recomputed), rel=1e-6)


def test_equal_sequences_go_one_to_a_rank_and_that_is_optimal(simple_model):
    found = plan([50, 50, 50, 50], simple_model, domain_size=4)
    assert sorted(item.first_rank for item in found.micro_batches) == [0, 1, 2, 3]
    assert found.predicted_seconds == 60
    assert found.status == "optimal"


def test_a_long_sequence_gets_the_ranks_that_hold_it(simple_model):
    found = plan([150, 20, 20], simple_model, domain_size=4, degrees=[1, 2])
    assert found.micro_batches[0].degree == 2
    assert found.micro_batches[0].sequences == (0,)
    assert found.predicted_seconds == 10 + 150 * 1.5


def test_a_wide_micro_batch_is_topped_up_rather_than_followed_by_another(simple_model):
    # 100 s of overhead: a second micro-batch on any rank costs more than widening the short sequences.
    model = replace(simple_model, micro_batch_overhead_seconds=100)
    found = plan([150, 20, 20], model, domain_size=2)
    assert found.micro_batches == (MicroBatch(0, 2, (0, 1, 2)),)


def test_static_uses_the_narrowest_degree_that_holds_the_longest(simple_model):
    found = plan([150, 60, 60], simple_model, domain_size=4, schedule="static")
    assert {item.degree for item in found.micro_batches} == {2}
    assert found.predicted_seconds == 10 + 150 * 1.5


def test_static_fills_ranks_without_work(simple_model):
    found = plan([10], simple_model, domain_size=4, schedule="static", static_degree=2)
    assert found.micro_batches == (MicroBatch(0, 2, (0,)), MicroBatch(2, 1, ()), MicroBatch(3, 1, ()))


def test_static_balances_packs_over_blocks(simple_model):
    found = plan([90, 80, 70, 60, 50, 40, 30, 20], simple_model, domain_size=2, schedule="static", static_degree=1)
    # 440 tokens need five packs: 215 + 3 x 10 and 225 + 2 x 10 would be even, but the lengths are tens.
    assert found.predicted_seconds == 250


@pytest.mark.parametrize(("lengths", "best_degree"), [([20, 20, 20, 20], 1), ([90, 20], 2), ([190], 4)])
def test_batch_adaptive_takes_the_best_single_degree_of_each_batch(simple_model, lengths, best_degree):
    # With latency and slow exchange, four ranks pay for a long sequence alone; 90 and 20 go side by side on two.
    fast = replace(simple_model, exchange_bandwidth_bytes_per_second={2: 80.0, 4: 10.0})
    found = plan(lengths, fast, domain_size=4, schedule="batch-adaptive")
    alone = {}
    for degree in (1, 2, 4):
        if max(lengths) <= degree * 100:
            alone[degree] = plan(lengths, fast, domain_size=4, schedule="static", static_degree=degree)
    assert found.schedule == "static"
    assert {item.degree for item in found.micro_batches if not item.is_filler} == {best_degree}
    assert found.predicted_seconds == min(made.predicted_seconds for made in alone.values())
    assert found.lower_bound_seconds == min(made.lower_bound_seconds for made in alone.values())
    assert found.status == "optimal"


def test_batch_adaptive_needs_a_degree_that_divides_the_domain(simple_model):
    with pytest.raises(FlexSPError, match="divides the domain of 6 ranks"):
        plan([290], simple_model, domain_size=6, schedule="batch-adaptive")


def test_counts_are_filled_up_to_a_multiple(simple_model):
    found = plan([90, 90, 90], simple_model, domain_size=1, count_multiple=2)
    assert [item.sequences for item in found.micro_batches].count(()) == 1
    assert found.predicted_seconds == 3 * 90 + 4 * 10


def test_capacity_given_directly_wins_over_the_memory_model(simple_model):
    model = replace(simple_model, activation_bytes_per_token=0)
    assert plan([150], model, domain_size=1, token_capacity=150).micro_batches[0].degree == 1
    with pytest.raises(FlexSPError, match="Correct the cost model, or give `token_capacity`"):
        plan([150], model, domain_size=1)


@pytest.mark.parametrize("schedule", ["nested", "lockstep", "static", "batch-adaptive"])
@pytest.mark.parametrize("slice_multiple", [1, 16])
def test_a_capacity_beyond_the_batch_changes_nothing(simple_model, schedule, slice_multiple):
    lengths = np.random.default_rng(0).integers(1, 200, 40)

    def planned(capacity, model=simple_model, **recomputed):
        found = plan(
            lengths, model, 4, schedule=schedule, token_capacity=capacity, slice_multiple=slice_multiple, **recomputed
        )
        found.validate(lengths, capacity or model.token_capacity, slice_multiple=slice_multiple, **recomputed)
        return found.digest()

    assert planned(1 << 62) == planned(1 << 40) == planned(int(lengths.sum()) + slice_multiple)
    assert planned(None, replace(simple_model, activation_bytes_per_token=1e-9)) == planned(1 << 40)
    assert planned(1 << 20, recomputed_token_capacity=1 << 62) == planned(1 << 20, recomputed_token_capacity=1 << 40)


def test_the_whole_domain_is_a_block_of_any_size(simple_model):
    model = replace(simple_model, exchange_bandwidth_bytes_per_second={3: 4.0})
    found = plan([290], model, domain_size=3)
    assert found.micro_batches == (MicroBatch(0, 3, (0,)),)


@pytest.mark.parametrize("domain_size", [1, 2, 6, 12, 48])
def test_all_but_one_overlong_with_no_room_to_spare(simple_model, domain_size):
    model = replace(simple_model, exchange_bandwidth_bytes_per_second={2: 4.0, 4: 2.0, 8: 1.0, 32: 1.0})
    widest = max(degree for degree in (1, 2, 4, 8, 32) if degree <= domain_size)
    lengths = [100 * widest] * 7 + [1]
    found = plan(lengths, model, domain_size)
    found.validate(lengths, model.token_capacity)


def test_first_plan_is_legal_and_no_better_than_a_searched_one(published_7b):
    lengths = np.random.default_rng(5).lognormal(6, 1.5, 300).astype(int) + 1
    first = plan(lengths, published_7b, 16, time_limit_seconds=0)
    searched = plan(lengths, published_7b, 16)
    first.validate(lengths, published_7b.token_capacity)
    assert searched.predicted_seconds < first.predicted_seconds


def test_the_same_batch_gives_the_same_plan(published_7b):
    lengths = np.random.default_rng(6).lognormal(6, 1.5, 200).astype(int) + 1
    digests = {plan(lengths, published_7b, 16).digest() for _ in range(2)}
    assert len(digests) == 1


def test_auto_means_nested(simple_model):
    assert plan([5], simple_model, 1, schedule="auto").schedule == "nested"


def test_nested_beats_static_on_a_long_tail(published_7b):
    lengths = [45682, *np.random.default_rng(3).lognormal(6, 1.2, 511).astype(int) + 1]
    nested = plan(lengths, published_7b, 64)
    static = plan(lengths, published_7b, 64, schedule="static")
    assert nested.predicted_seconds < static.predicted_seconds
    assert nested.predicted_seconds < 1.3 * nested.lower_bound_seconds


def test_many_sequences_are_planned_in_seconds(published_7b):
    lengths = np.random.default_rng(4).lognormal(6, 1.3, 20_000).astype(int) + 1
    started = time.process_time()
    plan(lengths, published_7b, 64)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": []}, "expected one row of at least one sequence"),
        ({"lengths": [[1]]}, "expected one row"),
        ({"lengths": [1.5]}, "expected whole numbers of tokens"),
        ({"lengths": [3, 0]}, "sequence 1 has 0 tokens"),
        ({"domain_size": 0}, "domain_size is 0"),
        ({"slice_multiple": 0}, "slice_multiple is 0"),
        ({"count_multiple": 1.5}, "count_multiple is 1.5"),
        ({"token_capacity": 0}, "token_capacity is 0"),
        ({"token_capacity": 3, "slice_multiple": 4}, r"multiple of\. Raise `token_capacity`$"),
        (
            {"token_capacity": 9, "recomputed_token_capacity": 8},
            r"nothing is gained\. Raise `recomputed_token_capacity`",
        ),
        ({"time_limit_seconds": -1}, "time_limit_seconds is -1"),
        ({"time_limit_seconds": float("nan")}, "time_limit_seconds is nan"),
        ({"degrees": []}, "degrees is empty"),
        ({"degrees": 8}, r"degrees is 8; expected several whole numbers. Pass `\[8\]`"),
        ({"degrees": [3]}, "degree 3 does not exist in a domain of 4 ranks; it has 1, 2, 4"),
        ({"degrees": [8]}, "degree 8 does not exist"),
        ({"degrees": [8], "domain_size": 8}, "no exchange_bandwidth_bytes_per_second for degree 8"),
        ({"schedule": "sideways"}, "schedule is 'sideways'; expected auto, nested, lockstep, static, batch-adaptive"),
        ({"static_degree": 2}, "static_degree 2 needs schedule static"),
        ({"schedule": "static", "static_degree": 4, "domain_size": 6}, "divides the domain of 6 ranks"),
        ({"schedule": "static", "static_degree": 3}, "degree 3 does not exist"),
    ],
)
def test_rejects_bad_arguments(simple_model, arguments, message):
    arguments = {"lengths": [5, 6], "domain_size": 4} | arguments
    with pytest.raises(FlexSPError, match=message):
        plan(cost_model=simple_model, **arguments)


def test_rejects_a_sequence_that_no_group_holds(simple_model):
    message = r"sequence 1 has 401 tokens, but the widest allowed group holds 400 \(4 ranks x 100 tokens\)"
    with pytest.raises(FlexSPError, match=message):
        plan([5, 401], simple_model, domain_size=8)
    for recomputed, parameter in ((None, "token_capacity"), (100, "recomputed_token_capacity")):
        with pytest.raises(FlexSPError, match=rf"\(`lengths`\), or raise `{parameter}` if memory allows"):
            plan([5, 401], simple_model, domain_size=8, recomputed_token_capacity=recomputed)


def test_rejects_constants_that_overflow(simple_model):
    model: CostModel = replace(simple_model, attention_seconds_per_token_squared=1e308)
    with pytest.raises(FlexSPError, match="no finite time"):
        plan([99], model, domain_size=1)


@pytest.mark.parametrize("seed", range(40))
def test_where_narrow_groups_are_the_dear_ones_nested_plans_are_no_worse_than_one_degree(seed):
    """Latencies and bandwidths in no order, odd domains: the narrowest degree may be a bad one."""
    generator = np.random.default_rng(seed)
    domain_size, capacity = int(generator.choice([3, 5, 6, 7, 12, 24])), int(generator.integers(20, 200))
    wide = [degree for degree in legal_degrees(domain_size) if degree > 1]
    model = CostModel(
        memory_budget_bytes=capacity,
        model_state_bytes=0,
        activation_bytes_per_token=1,
        attention_seconds_per_token_squared=float(generator.uniform(0, 0.002)),
        linear_seconds_per_token=float(generator.uniform(0, 1)),
        micro_batch_overhead_seconds=float(generator.choice([0, 1, 10])),
        exchange_bytes_per_token=1,
        exchange_bandwidth_bytes_per_second={degree: float(generator.uniform(0.5, 20)) for degree in wide},
        exchange_latency_seconds={degree: float(generator.choice([0, 1, 50, 200])) for degree in wide},
    )
    drawn = generator.lognormal(np.log(capacity * 0.6), 1, int(generator.integers(4, 60)))
    lengths = np.clip(drawn.astype(int), 1, capacity * domain_size)
    nested = plan(lengths, model, domain_size)
    alone = plan(lengths, model, domain_size, schedule="batch-adaptive")
    assert nested.predicted_seconds <= max(alone.predicted_seconds, 1.1 * nested.lower_bound_seconds) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_where_most_tokens_need_wide_groups_nested_plans_are_no_worse_than_one_degree(seed):
    """A mix of degrees leaves ranks idle there that one degree keeps busy: nested plans took 1 to 5 % longer."""
    model = load_cost_model("gpt-7b-192k")
    lengths = np.minimum(np.random.default_rng(seed).lognormal(np.log(12000), 1, 64).astype(int) + 1, 32768)
    nested, alone = (plan(lengths, model, domain_size=64, schedule=name) for name in ("nested", "batch-adaptive"))
    assert nested.predicted_seconds <= alone.predicted_seconds * 1.002


def test_a_small_batch_with_a_huge_sequence_is_no_worse_than_in_lockstep():
    # 15,653 of 37,807 tokens are one sequence, which four of the eight ranks must share.
    lengths = [15653, 5741, 3571, 1900, 1186, 1166, 1085, 1067, 964, 613, 607, 600]
    lengths += [549, 540, 424, 412, 359, 347, 340, 267, 190, 114, 74, 38]
    cost_model = CostModel(
        memory_budget_bytes=4096,
        model_state_bytes=0,
        activation_bytes_per_token=1,
        attention_seconds_per_token_squared=7.3e-9,
        linear_seconds_per_token=1e-4,
        micro_batch_overhead_seconds=0.01,
        exchange_bytes_per_token=2e6,
        exchange_bandwidth_bytes_per_second={2: 2.66e11, 4: 3.3e10, 8: 3.3e10},
        exchange_latency_seconds={2: 0.004, 4: 0.008, 8: 0.016},
    )
    nested = plan(lengths, cost_model, 8)
    nested.validate(lengths, cost_model.token_capacity)
    assert nested.predicted_seconds <= plan(lengths, cost_model, 8, schedule="lockstep").predicted_seconds
