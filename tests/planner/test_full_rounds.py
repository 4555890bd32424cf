"""Rounds without fillers: every law still holds, and no rank is left without a sequence."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner import CostModel, MicroBatch, Plan, legal_degrees, plan
from megatron_flexsp.planner.full_rounds import without_fillers
from megatron_flexsp.planner.laws import rounds


def cost_model(domain_size: int, latency: float = 0.0) -> CostModel:
    wide = [degree for degree in legal_degrees(domain_size) if degree > 1]
    return CostModel(
        memory_budget_bytes=0,
        model_state_bytes=0,
        activation_bytes_per_token=0,
        attention_seconds_per_token_squared=1e-6,
        linear_seconds_per_token=1e-3,
        micro_batch_overhead_seconds=0.05,
        exchange_bytes_per_token=1.0,
        exchange_bandwidth_bytes_per_second={degree: 1e3 for degree in wide},
        exchange_latency_seconds={degree: latency * degree for degree in wide},
    )


@given(
    st.lists(st.integers(1, 60), min_size=4, max_size=30),
    st.sampled_from([2, 4, 6, 8, 12]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([0.0, 10.0]),
)
def test_every_rank_holds_a_sequence_in_every_round(
    lengths: list[int], domain_size: int, count_multiple: int, latency: float
) -> None:
    costs = cost_model(domain_size, latency)
    found = plan(
        lengths,
        costs,
        domain_size,
        schedule="lockstep",
        token_capacity=30,
        count_multiple=count_multiple,
        time_limit_seconds=0,
    )
    if len(rounds(found)) > len(lengths):
        return
    full = without_fillers(found, lengths, costs, degrees=legal_degrees(domain_size), token_capacity=30)
    full.validate(lengths, 30, count_multiple=count_multiple)
    assert not any(item.is_filler for item in full.micro_batches)
    assert len(rounds(full)) == len(rounds(found))


def _of(*micro_batches: MicroBatch) -> Plan:
    return Plan(4, "lockstep", micro_batches, 1.0, 0.1, 0.0, "feasible")


def test_left_over_ranks_go_where_they_save_most() -> None:
    found = _of(MicroBatch(0, 1, (0,)), MicroBatch(1, 1, (1,)), MicroBatch(2, 1, (2,)), MicroBatch(3, 1, ()))
    full = without_fillers(found, [5, 9, 7], cost_model(4), degrees=(1, 2, 4), token_capacity=10)
    assert full.micro_batches == (MicroBatch(0, 2, (1,)), MicroBatch(2, 1, (0,)), MicroBatch(3, 1, (2,)))
    assert 0 < full.predicted_seconds < 1


def test_a_pack_is_parted_where_its_group_may_not_widen() -> None:
    found = _of(*(MicroBatch(rank, 1, (rank,)) for rank in range(2)), MicroBatch(2, 1, (2, 3)), MicroBatch(3, 1, ()))
    full = without_fillers(found, [4, 4, 1, 3], cost_model(4), degrees=(1,), token_capacity=10)
    assert sorted(item.sequences for item in full.micro_batches) == [(0,), (1,), (2,), (3,)]


def test_an_empty_round_is_filled_from_the_longest() -> None:
    empty = [MicroBatch(rank, 1, ()) for rank in range(4)]
    found = _of(MicroBatch(0, 4, (0, 1, 2)), *empty)
    full = without_fillers(found, [30, 2, 20], cost_model(4), degrees=(1, 2, 4), token_capacity=20)
    full.validate([30, 2, 20], 20, count_multiple=2)
    assert not any(item.is_filler for item in full.micro_batches)


def test_a_plan_that_has_none_is_left_alone() -> None:
    lengths = np.full(8, 10)
    found = plan(lengths, cost_model(4), 4, schedule="lockstep", token_capacity=20)
    assert without_fillers(found, lengths, cost_model(4), degrees=(1, 2, 4), token_capacity=20) is found


def test_fewer_sequences_than_rounds() -> None:
    empty = [MicroBatch(rank, 1, ()) for rank in range(4)]
    with pytest.raises(FlexSPError, match=r"a step of 1 sequences can't fill 2 micro-batches.*`lengths`"):
        without_fillers(_of(MicroBatch(0, 4, (0,)), *empty), [3], cost_model(4), degrees=(1, 2, 4), token_capacity=10)


def test_degrees_that_cannot_fill_the_domain() -> None:
    found = _of(MicroBatch(0, 1, (0,)), *(MicroBatch(rank, 1, ()) for rank in range(1, 4)))
    with pytest.raises(FlexSPError, match=r"groups of 1, 2 ranks can't fill 4 ranks with 1 sequences.*`degrees`"):
        without_fillers(found, [3], cost_model(4), degrees=(1, 2), token_capacity=10)
