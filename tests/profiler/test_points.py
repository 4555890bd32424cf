"""What is measured fits into memory, is a legal plan, and keeps every rank busy."""

import numpy as np
import pytest

from megatron_flexsp.planner import legal_degrees
from megatron_flexsp.profiler.points import choose_points, plan_of


@pytest.mark.parametrize(("domain_size", "count_multiple"), [(1, 1), (2, 1), (8, 1), (6, 1), (4, 2)])
def test_points_are_legal_plans(domain_size: int, count_multiple: int) -> None:
    lengths = np.array([3, 700, 12, 64, 64, 5000, 90])
    points = choose_points(legal_degrees(domain_size), 256, lengths, longest=600, count_multiple=count_multiple)
    assert {point.degree for point in points} == set(legal_degrees(domain_size))
    for point in points:
        plan, plan_lengths = plan_of(point, domain_size)
        plan.validate(plan_lengths, 256, count_multiple=count_multiple)
        assert max(point.lengths) <= 600


def test_steps_fill_the_pipeline_and_some_do_not() -> None:
    points = choose_points((1, 2), 512, np.array([10, 20, 40, 80]), longest=1024, count_multiple=2, pipeline_stages=3)
    assert {point.rounds for point in points} == {2, 4, 8, 16}


@pytest.mark.parametrize("domain_size", [2, 6])
def test_points_are_lockstep_plans_where_ranks_must_stay_in_step(domain_size: int) -> None:
    for point in choose_points(legal_degrees(domain_size), 256, np.array([3, 64, 90]), longest=600):
        plan, lengths = plan_of(point, domain_size, in_rounds=True)
        assert plan.schedule == "lockstep"
        plan.validate(lengths, 256)


def test_points_differ_in_what_the_constants_stand_for() -> None:
    points = choose_points((1, 2), 512, np.array([10, 20, 40, 80]), longest=1024)
    for degree, sizes in ((1, 4), (2, 3)):
        kinds = {(p.tokens, p.tokens_squared, p.rounds) for p in points if p.degree == degree}
        assert len({tokens for tokens, _, _ in kinds}) == sizes
        assert len({rounds for _, _, rounds in kinds}) == 3
        half = {squared for tokens, squared, _ in kinds if tokens == 256 * degree}
        assert max(half) > 5 * min(half), "one long sequence against many short ones"
