"""What holds for every plan, on batches, clusters and cost models drawn at random."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_flexsp.planner import (
    CostModel,
    MicroBatch,
    Plan,
    first_ranks,
    legal_degrees,
    plan,
    step_seconds,
)
from megatron_flexsp.planner.wire import plan_from_bytes, plan_to_bytes

repeatable = settings(derandomize=True, deadline=None, database=None)


@st.composite
def cost_models(draw, degrees, token_capacity):
    """Cost models that price the given degrees; any constant of time may be zero."""
    seconds = st.one_of(st.just(0.0), st.floats(1e-6, 10.0))
    wide = [degree for degree in degrees if degree > 1]
    return CostModel(
        memory_budget_bytes=token_capacity * 7,
        model_state_bytes=0,
        activation_bytes_per_token=7,
        attention_seconds_per_token_squared=draw(seconds) / 1000,
        linear_seconds_per_token=draw(seconds) / 10,
        micro_batch_overhead_seconds=draw(seconds),
        exchange_bytes_per_token=draw(st.sampled_from([0, 1, 1000])),
        exchange_bandwidth_bytes_per_second={degree: draw(st.floats(10.0, 1e5)) for degree in wide},
        exchange_latency_seconds={degree: draw(seconds) for degree in wide if draw(st.booleans())},
        pipeline_fill_share=draw(st.sampled_from([1.0, 0.3, 0.0])),
    )


@st.composite
def feasible_arguments(draw):
    """Keyword arguments of ``plan`` for which a plan exists."""
    domain_size = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 48]))
    schedule = draw(st.sampled_from(["nested", "lockstep", "static", "batch-adaptive"]))
    has_one_degree = schedule in ("static", "batch-adaptive")
    legal = [d for d in legal_degrees(domain_size) if not has_one_degree or domain_size % d == 0]
    degrees = draw(st.lists(st.sampled_from(legal), min_size=1, unique=True))
    slice_multiple = draw(st.sampled_from([1, 2, 5]))
    token_capacity = draw(st.integers(slice_multiple, 200))
    recomputed = draw(st.one_of(st.none(), st.integers(token_capacity, 8 * token_capacity)))
    slice_capacity = token_capacity if recomputed is None else recomputed
    longest = max(degrees) * (slice_capacity - slice_capacity % slice_multiple)
    lengths = st.one_of(st.integers(1, longest), st.integers(1, min(longest, 20)), st.just(longest))
    return {
        "lengths": draw(st.lists(lengths, min_size=1, max_size=40)),
        "cost_model": draw(cost_models(degrees, token_capacity)),
        "domain_size": domain_size,
        "schedule": schedule,
        "degrees": degrees,
        "token_capacity": token_capacity,
        "recomputed_token_capacity": recomputed,
        "slice_multiple": slice_multiple,
        "count_multiple": draw(st.sampled_from([1, 1, 2, 3])),
        "pipeline_stages": draw(st.sampled_from([1, 1, 2, 5])),
        "time_limit_seconds": draw(st.sampled_from([None, 0])),
        "seed": draw(st.integers(0, 3)),
    }


@settings(repeatable, max_examples=200)
@given(feasible_arguments())
def test_every_plan_keeps_the_laws_and_its_own_word(arguments):
    lengths, cost_model = arguments["lengths"], arguments["cost_model"]
    found = plan(**arguments)
    found.validate(
        lengths,
        arguments["token_capacity"],
        recomputed_token_capacity=arguments["recomputed_token_capacity"],
        slice_multiple=arguments["slice_multiple"],
        count_multiple=arguments["count_multiple"],
    )
    assert {item.degree for item in found.micro_batches if not item.is_filler} <= set(arguments["degrees"])
    pipeline_stages = arguments["pipeline_stages"]
    assert found.predicted_seconds == step_seconds(found, lengths, cost_model, pipeline_stages=pipeline_stages)
    assert found.predicted_seconds >= found.lower_bound_seconds
    assert Plan.from_json(found.to_json()) == found
    assert Plan.from_json(found.to_json()).digest() == found.digest()
    assert plan_from_bytes(plan_to_bytes(found)) == found
    assert plan(**arguments).digest() == found.digest()


def best_nested_seconds(lengths, cost_model, domain_size, token_capacity):
    """The optimum of a tiny batch, by trying every way to put sequences into packs on blocks."""
    blocks = [(first, d) for d in legal_degrees(domain_size) for first in first_ranks(d, domain_size)]
    places = [(first, degree, pack) for first, degree in blocks for pack in range(len(lengths))]
    best = float("inf")
    for choice in product(places, repeat=len(lengths)):
        members = {place: [] for place in choice}
        for position, place in enumerate(choice):
            members[place].append(position)
        if any(sum(lengths[k] for k in held) > place[1] * token_capacity for place, held in members.items()):
            continue
        free_at = [0.0] * domain_size
        for (first, degree, _), held in sorted(members.items(), key=lambda item: -item[0][1]):
            seconds = cost_model.micro_batch_seconds([lengths[k] for k in held], degree)
            for rank in range(first, first + degree):
                free_at[rank] += seconds
        best = min(best, max(*free_at, cost_model.micro_batch_overhead_seconds))
    return best


@settings(repeatable, max_examples=12)
@given(st.data())
def test_bound_and_plan_enclose_the_optimum_of_tiny_batches(data):
    domain_size = data.draw(st.sampled_from([1, 2, 3]))
    cost_model = data.draw(cost_models(legal_degrees(domain_size), token_capacity=50))
    lengths = data.draw(st.lists(st.integers(1, 50 * domain_size), min_size=1, max_size=3))
    optimum = best_nested_seconds(lengths, cost_model, domain_size, token_capacity=50)
    found = plan(lengths, cost_model, domain_size)
    assert found.lower_bound_seconds <= optimum * (1 + 1e-12)
    assert found.predicted_seconds >= optimum * (1 - 1e-12)


def test_lockstep_plans_do_not_beat_the_bound(simple_model):
    lengths = [50, 50, 50, 50]
    lockstep = Plan(
        2,
        "lockstep",
        tuple(MicroBatch(rank, 1, (2 * turn + rank,)) for turn in range(2) for rank in range(2)),
        0.0,
        0.0,
        0.0,
        "heuristic",
    )
    lockstep.validate(lengths, simple_model.token_capacity)
    bound = plan(lengths, simple_model, domain_size=2).lower_bound_seconds
    assert step_seconds(lockstep, lengths, simple_model) >= bound == pytest.approx(2 * 10 / 2 + 100)
