"""Packs taken apart: what is kept is the sample's own, and what is left out teaches nothing."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron.packed_samples import Unpacking, unpack

HOW = Unpacking(longest=64, positions_count=True, unlearned_count=False)
WHOLE = Unpacking(longest=64, positions_count=True, unlearned_count=True)


@st.composite
def packs(draw: st.DrawFn) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """A sample, and where each of its sequences lies: padding within, behind them, or ``cu_seqlens`` padded."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    gaps = draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    tail, repeats = draw(st.integers(0, 5)), draw(st.integers(0, 3))
    spans, begin = [], 0
    for length, gap in zip(lengths, gaps, strict=True):
        spans.append((begin, begin + length))
        begin += length + gap
    total = max(begin + tail, 1)
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    mask, positions = np.zeros(total), np.full(total, 7)
    for start, stop in spans:
        mask[start:stop] = generator.random(stop - start) < draw(st.sampled_from([0.0, 0.3, 1.0]))
        positions[start:stop] = np.arange(stop - start)
    labels = np.where(mask, generator.integers(1, 100, total), -100)
    sample = {"tokens": generator.integers(0, 100, total), "labels": labels, "loss_mask": mask.astype(np.float32)}
    sample["cu_seqlens"] = np.cumsum([0, *lengths, *[0] * repeats])
    sample["position_ids"] = positions
    if any(gaps):
        sample["cu_seqlens_padded"] = np.cumsum([0, *np.add(lengths, gaps), *[0] * repeats])
    if draw(st.booleans()):
        sample = {name: torch.from_numpy(array)[None] for name, array in sample.items()}
    return sample, spans


@given(packs())
def test_every_label_that_counts_is_kept_with_all_that_it_sees(pack: tuple[dict[str, Any], list]) -> None:
    sample, spans = pack
    tokens, labels, mask = (np.asarray(sample[name]).reshape(-1) for name in ("tokens", "labels", "loss_mask"))
    found, whole = unpack(sample, HOW), unpack(sample, WHOLE)
    assert list(zip(whole.starts, whole.starts + whole.lengths, strict=True)) == [
        (start, stop) for start, stop in spans if stop > start
    ]
    expected = []
    for start, stop in spans:
        learned = np.flatnonzero(mask[start:stop])
        if len(learned):
            expected.append((start, learned[-1] + 1))
    assert list(zip(found.starts, found.lengths, strict=True)) == expected
    for start, length in zip(found.starts, found.lengths, strict=True):
        part = found.stretch(int(start), int(length))
        here = slice(start, start + length)
        assert part.learned is not None
        assert part.tokens.tolist() == tokens[here].tolist()
        assert part.learned.tolist() == (mask[here] != 0).tolist()
        assert part.labels.tolist() == np.where(mask[here], labels[here], 0).tolist()


def sample(**changes: Any) -> dict[str, Any]:
    numbers = np.arange(6)
    pack = {"tokens": numbers, "labels": numbers, "loss_mask": np.array([1, 1, 1, 1, 1, 0.0])}
    pack |= {"cu_seqlens": np.array([0, 2, 5]), "position_ids": np.array([0, 1, 0, 1, 2, 3])} | changes
    return {name: value for name, value in pack.items() if value is not None}


def test_an_untouched_sample_is_taken() -> None:
    found = unpack(sample(), HOW)
    assert (found.starts.tolist(), found.lengths.tolist()) == ([0, 2], [2, 3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens": None}, "has no cu_seqlens, but tokens, labels, loss_mask, position_ids"),
        ({"cu_seqlens": np.array([0, 5, 2])}, "cu_seqlens doesn't count upwards from 0: 0, 5, 2"),
        ({"cu_seqlens": np.array([0, 2, 5, -1])}, "doesn't count upwards from 0: 0, 2, 5, -1"),
        ({"cu_seqlens": np.array([1, 5])}, "doesn't count upwards from 0: 1, 5"),
        ({"cu_seqlens": np.array([0, 9])}, "cu_seqlens ends at 9, and it has 6 tokens"),
        ({"cu_seqlens": np.array([0, 2, 4])}, "labels that lie outside of the sequences"),
        ({"cu_seqlens_padded": np.array([0, 1, 6])}, "less room for the sequences"),
        ({"loss_mask": np.ones(5)}, "6 tokens, 6 labels and 5 numbers in loss_mask"),
        ({"loss_mask": np.array([1, 1, 1, 1, 0.5, 0])}, "other values than 0 and 1"),
        ({"tokens": np.zeros((2, 3), dtype=int)}, r"tokens has the shape \[2, 3\]"),
        ({"labels": np.zeros(6)}, "labels are float64, and are to be whole numbers"),
        ({"position_ids": np.arange(6)}, "position_ids don't count from 0 in each sequence"),
        ({"position_ids": np.arange(5)}, "6 tokens and 5 position_ids"),
    ],
)
def test_what_is_no_pack_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FlexSPError, match=message):
        unpack(sample(**changes), HOW)


def test_a_sequence_that_is_too_long_is_refused() -> None:
    with pytest.raises(FlexSPError, match="a sequence of 3 tokens is longer than --seq-length 2"):
        unpack(sample(), Unpacking(longest=2, positions_count=True, unlearned_count=False))


def test_position_ids_matter_only_where_positions_are_learned() -> None:
    unpack(sample(position_ids=np.arange(6)), Unpacking(longest=64, positions_count=False, unlearned_count=False))


def test_any_change_of_a_sample_shows_in_its_checksum() -> None:
    changed = [sample(tokens=np.arange(1, 7)), sample(loss_mask=np.array([1, 0, 1, 1, 1, 0.0]))]
    changed.append(sample(cu_seqlens=np.array([0, 1, 5]), position_ids=np.array([0, 0, 1, 2, 3, 0])))
    assert len({unpack(pack, HOW).checksum for pack in [sample(), *changed]}) == 4
