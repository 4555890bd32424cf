"""The nested bound holds for any prices, and counts what only whole packs and whole micro-batches show."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_flexsp.planner import plan
from megatron_flexsp.planner.bounds import simple_bound_seconds
from megatron_flexsp.planner.classes import make_classes
from megatron_flexsp.planner.nested_bound import Ranks, nested_bound_seconds, rank_kinds
from megatron_flexsp.planner.problem import make_problem
from tests.planner.test_optimum import draw_instance


@pytest.mark.parametrize("seed", range(40))
def test_no_prices_prove_more_than_the_optimum(seed):
    """Whatever they are: drawn at random, they must not show a step to be impossible that a plan takes."""
    generator = np.random.default_rng(seed)
    lengths, cost_model, domain_size, degrees, settings = draw_instance(generator)
    optimum = plan(lengths, cost_model, domain_size, degrees=degrees, **settings).predicted_seconds
    problem = make_problem(lengths, cost_model, domain_size, degrees=degrees, **settings)
    kinds = rank_kinds(problem, 2 * optimum)
    ranks = Ranks(make_classes(problem, most=100), kinds)
    for _ in range(20):
        shape = (len(kinds), len(degrees))
        second = generator.choice([0.0, 1.0, generator.uniform(0, 2)], len(kinds))
        tokens, exclusive = generator.uniform(0, 60, (2, *shape)) * generator.choice([0, 1], (2, *shape))
        prices = ranks.with_slot_prices(second, tokens, exclusive)
        assert ranks.greatest_impossible(prices, optimum / 8, 2 * optimum) <= optimum * (1 + 1e-12)


def test_classes_take_no_more_than_their_sequences(published_7b):
    lengths = np.random.default_rng(1).lognormal(6.5, 1.8, 400).astype(int) + 1
    problem = make_problem(lengths, published_7b, 64)
    rough, exact = make_classes(problem, most=20), make_classes(problem, most=len(lengths))
    assert rough.counts.sum() == len(lengths)
    for name in ("full_slots", "exclusive_slots", "work"):
        of_classes, of_sequences = np.atleast_2d(getattr(rough, name)), np.atleast_2d(getattr(exact, name))
        sums = np.add.reduceat(of_sequences, rough.starts, axis=1)
        assert (of_classes <= sums * (1 + 1e-12)).all(), name


def test_long_sequences_that_cannot_share_a_pack_each_pay_for_one(simple_model):
    # Sequences of 60 can't share a rank's pack of 100, so six of them take three micro-batches on some rank of
    # two. Their 360 tokens would fill four slots; a work bound counts no more overheads than that.
    problem = make_problem([60] * 6, replace(simple_model, exchange_bytes_per_token=100), domain_size=2, degrees=[1])
    assert simple_bound_seconds(problem) == pytest.approx(4 * 10 / 2 + 180)
    assert nested_bound_seconds(problem) == pytest.approx(3 * 10 + 180, rel=1e-2)
