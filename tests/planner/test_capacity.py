"""What a token capacity comes to."""

from megatron_flexsp.planner import narrowest_degree, usable_capacity


def test_slices_are_padded() -> None:
    assert usable_capacity(100) == 100
    assert usable_capacity(100, 16) == 96


def test_the_fewest_ranks_that_hold_a_sequence() -> None:
    degrees = (1, 2, 4, 6)
    assert narrowest_degree(degrees, 200, 100) == 2
    assert narrowest_degree(degrees, 200, 100, slice_multiple=16) == 4
    assert narrowest_degree(degrees, 200, 100, slice_multiple=16, static_domain_size=6) == 6
    assert narrowest_degree(degrees, 601, 100) is None
