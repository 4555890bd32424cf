"""Which degrees and blocks a domain has."""

import pytest

from megatron_flexsp.planner import first_ranks, is_aligned_block, legal_degrees


@pytest.mark.parametrize(
    ("domain_size", "degrees"),
    [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8)), (48, (1, 2, 4, 8, 16, 32, 48))],
)
def test_legal_degrees_are_powers_of_two_and_the_domain(domain_size, degrees):
    assert legal_degrees(domain_size) == degrees


def test_ranks_that_no_whole_block_covers_are_left_over():
    assert list(first_ranks(4, 6)) == [0]
    assert list(first_ranks(2, 6)) == [0, 2, 4]


@pytest.mark.parametrize(
    ("first_rank", "degree", "legal"),
    [
        (0, 4, True),
        (4, 4, False),
        (2, 4, False),
        (0, 6, True),
        (1, 2, False),
        (0, 3, False),
        (5, 1, True),
        (-2, 2, False),
    ],
)
def test_blocks_of_a_domain_of_six(first_rank, degree, legal):
    assert is_aligned_block(first_rank, degree, 6) is legal


@pytest.mark.parametrize("domain_size", range(1, 70))
def test_blocks_nest_or_are_disjoint(domain_size):
    blocks = [
        set(range(first, first + degree))
        for degree in legal_degrees(domain_size)
        for first in first_ranks(degree, domain_size)
    ]
    for narrow in blocks:
        for wide in blocks:
            assert narrow <= wide or wide <= narrow or not narrow & wide
