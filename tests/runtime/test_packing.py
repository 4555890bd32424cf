"""The layout of a pack: what each rank's slice holds, at which positions, and where the padding lies."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_flexsp.runtime import PackLayout, Piece


def members(lengths: tuple[int, ...], degree: int, slice_multiple: int = 1) -> list[PackLayout]:
    return [PackLayout(lengths, degree, member, slice_multiple) for member in range(degree)]


def test_sequences_are_cut_where_slices_end() -> None:
    first, second = members((3, 5), degree=2)
    assert (first.slice_tokens, first.padded_tokens, first.segment_lengths) == (4, 8, (3, 5))
    assert first.pieces == (Piece(0, 0, 3), Piece(1, 0, 1))
    assert second.pieces == (Piece(1, 1, 5),)
    assert first.positions.tolist() == [0, 1, 2, 0]
    assert second.positions.tolist() == [1, 2, 3, 4]


def test_a_pack_is_padded_once_at_its_end() -> None:
    layouts = members((4, 1, 2), degree=4)
    assert [layout.slice_tokens for layout in layouts] == [2, 2, 2, 2]
    assert layouts[0].segment_lengths == (4, 1, 2, 1)
    assert [layout.pieces for layout in layouts] == [
        (Piece(0, 0, 2),),
        (Piece(0, 2, 4),),
        (Piece(1, 0, 1), Piece(2, 0, 1)),
        (Piece(2, 1, 2),),
    ]
    assert layouts[3].positions.tolist() == [1, 0]


def test_slices_divide_by_the_tensor_parallel_size() -> None:
    layouts = members((9,), degree=2, slice_multiple=4)
    assert [layout.slice_tokens for layout in layouts] == [8, 8]
    assert layouts[0].segment_lengths == (9, 7)
    assert layouts[1].pieces == (Piece(0, 8, 9),)
    assert layouts[1].positions.tolist() == [8, 0, 0, 0, 0, 0, 0, 0]


def test_kernels_meet_few_numbers_of_segments() -> None:
    layouts = [PackLayout((3,) * count, degree=1, member=0) for count in range(1, 200)]
    for layout in layouts:
        lengths = np.diff(layout.cu_seqlens)
        segments = len(layout.lengths)
        assert lengths[:segments].tolist() == list(layout.segment_lengths) and not lengths[segments:].any()
    assert {len(layout.cu_seqlens) - 1 for layout in layouts} == {1, 2, 4, 8, 16, 32, 64, 128, 256}


def test_a_slice_may_hold_padding_alone() -> None:
    layouts = members((1,), degree=4)
    assert [layout.pieces for layout in layouts] == [(Piece(0, 0, 1),), (), (), ()]
    assert [layout.positions.tolist() for layout in layouts] == [[0], [0], [0], [0]]
    assert layouts[0].segment_lengths == (1, 3)


@pytest.mark.parametrize("slice_multiple", [1, 2, 8])
def test_a_filler_is_the_smallest_slice_of_padding(slice_multiple: int) -> None:
    filler = PackLayout((), degree=1, member=0, slice_multiple=slice_multiple)
    assert (filler.total_tokens, filler.slice_tokens, filler.padded_tokens) == (0, slice_multiple, slice_multiple)
    assert filler.segment_lengths == (slice_multiple,)
    assert filler.pieces == ()
    assert filler.positions.tolist() == [0] * slice_multiple


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12).map(tuple),
    degree=st.integers(1, 9),
    slice_multiple=st.sampled_from([1, 2, 3, 4, 8]),
)
def test_the_slices_of_all_members_are_the_pack(lengths: tuple[int, ...], degree: int, slice_multiple: int) -> None:
    layouts = members(lengths, degree, slice_multiple)
    (slice_tokens,) = {layout.slice_tokens for layout in layouts}
    assert slice_tokens % slice_multiple == 0
    assert degree * (slice_tokens - slice_multiple) < sum(lengths) <= degree * slice_tokens
    assert all(sum(layout.segment_lengths) == layout.padded_tokens == degree * slice_tokens for layout in layouts)

    pack = [(sequence, position) for sequence, length in enumerate(lengths) for position in range(length)]
    found = []
    for layout in layouts:
        here = [(piece.sequence, at) for piece in layout.pieces for at in range(piece.start, piece.stop)]
        # Tokens lie at the slice's beginning, so that what is missing at its end is padding.
        assert layout.positions.dtype == np.int64
        padding = slice_tokens - len(here)
        assert layout.positions.tolist() == [position for _, position in here] + [0] * padding
        assert pack[layout.member * slice_tokens :][:slice_tokens] == here
        found += here
    assert found == pack
