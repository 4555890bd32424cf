"""The paper's pieces: how it cuts the batch, what it takes for ceilings, how it plans a round."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from megatron_flexsp.planner import load_cost_model
from megatron_flexsp.planner.exchange import exchange
from megatron_flexsp.planner.problem import make_problem
from megatron_flexsp.planner.round_program import blast, bucket_ceilings, plan_round
from megatron_flexsp.planner.rounds import Group, RoundRules, Shape, pack_rounds, round_seconds


@pytest.mark.parametrize("seed", range(20))
def test_chunks_are_as_even_as_can_be(seed):
    generator = np.random.default_rng(seed)
    tokens = sorted(generator.integers(1, 50, 9).tolist())
    chunks = int(generator.integers(1, 5))
    found = blast(tokens, chunks)
    assert [index for chunk in found for index in chunk] == list(range(9))
    assert len(found) <= chunks
    cuts = [(0, *inner, 9) for inner in combinations(range(1, 9), chunks - 1)]
    best = min(max(sum(tokens[a:b]) for a, b in pairwise(cut)) for cut in cuts)
    assert max(sum(tokens[index] for index in chunk) for chunk in found) == best


@pytest.mark.parametrize("seed", range(20))
def test_ceilings_add_the_fewest_tokens(seed):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, 40, 12).tolist()
    distinct = sorted(set(tokens))

    def added(ceilings):
        return sum(min(c for c in ceilings if c >= length) - length for length in tokens)

    best = min(added((*inner, distinct[-1])) for inner in combinations(distinct[:-1], 2))
    assert added(bucket_ceilings(tokens, 3)) == best


def test_few_lengths_are_their_own_ceilings():
    assert bucket_ceilings([5, 3, 3, 9], 4) == [3, 5, 9]


def test_many_lengths_stay_under_their_ceilings():
    ceilings = bucket_ceilings(list(range(1, 3000)))
    assert len(ceilings) <= 16
    assert ceilings[-1] == 2999


@pytest.fixture
def clumsy_round():
    """A problem and a round in which the shortest half runs one to a group."""
    lengths = np.random.default_rng(0).integers(200, 4000, 24)
    problem = make_problem(lengths, load_cost_model("gpt-7b-192k"), 16)
    groups = [Group(4, tuple(range(18, 24))), Group(2, tuple(range(12, 18)))]
    groups += [Group(1, (first, first + 1)) for first in range(0, 12, 2)]
    return problem, tuple(groups)


def test_program_betters_a_clumsy_round(clumsy_round):
    problem, known = clumsy_round
    better = plan_round(problem, list(range(24)), known, time_limit_seconds=5)
    assert round_seconds(problem, better) < round_seconds(problem, known)
    assert sorted(index for group in better for index in group.sequences) == list(range(24))
    assert sum(group.degree for group in better) <= 16


def test_exchange_betters_a_clumsy_round_and_keeps_its_groups(clumsy_round):
    problem, known = clumsy_round
    (better,) = exchange(problem, [known], deadline=float("inf"))
    assert round_seconds(problem, better) < round_seconds(problem, known)
    assert sorted(group.degree for group in better) == sorted(group.degree for group in known)
    assert sorted(index for group in better for index in group.sequences) == list(range(24))


def test_rounds_that_are_too_short_are_refused(clumsy_round):
    problem, _ = clumsy_round
    assert pack_rounds(problem, [Shape(problem.overhead_seconds * 1.01)], RoundRules()) is None
