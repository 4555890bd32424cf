"""Batches: which samples, and each rank's slices of them against the samples read whole."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_flexsp.megatron.batches import SliceReader, batches_from
from megatron_flexsp.megatron.documents import SampleSource
from megatron_flexsp.megatron.sequences import Sequences
from megatron_flexsp.planner import MicroBatch, Plan
from tests.megatron.stored import open_documents, write


class TestBatchesFrom:
    def test_are_consecutive_and_an_incomplete_last_one_is_left_out(self) -> None:
        assert list(batches_from(0, 11, lambda consumed: 4)) == [range(0, 4), range(4, 8)]
        assert list(batches_from(0, 3, lambda consumed: 4)) == []

    def test_follow_a_ramp_of_batch_sizes(self) -> None:
        ramp = batches_from(0, 20, lambda consumed: 2 if consumed < 4 else 4 if consumed < 12 else 6)
        assert [len(batch) for batch in ramp] == [2, 2, 4, 4, 6]

    @given(total=st.integers(0, 60), steps=st.integers(0, 8))
    def test_go_on_where_a_run_stopped(self, total: int, steps: int) -> None:
        def size_at(consumed: int) -> int:
            return 2 + consumed // 7

        whole = list(batches_from(0, total, size_at))
        consumed = sum(map(len, whole[:steps]))
        assert list(batches_from(consumed, total, size_at)) == whole[steps:]


PLAN = Plan(
    domain_size=4,
    schedule="nested",
    micro_batches=(
        MicroBatch(0, 4, (5, 0)),
        MicroBatch(0, 2, (3,)),
        MicroBatch(2, 2, (1, 4)),
        MicroBatch(0, 1, (2,)),
        MicroBatch(3, 1, ()),
    ),
    predicted_seconds=1.0,
    lower_bound_seconds=1.0,
    solve_seconds=0.0,
    status="heuristic",
)
FIRST_SAMPLE = 2


class TestSliceReader:
    @pytest.fixture
    def source(self, tmp_path: Path) -> SampleSource:
        write(tmp_path / "data", [[n] for n in (4, 8, 13, 2, 21, 6, 9)], first_token=100)
        return SampleSource(open_documents(tmp_path / "data", 10))

    @pytest.mark.parametrize("slice_multiple", [1, 2, 4])
    def test_the_slices_of_a_group_are_its_sequences_side_by_side(
        self, slice_multiple: int, source: SampleSource
    ) -> None:
        samples = range(FIRST_SAMPLE, FIRST_SAMPLE + 6)
        lengths = source.lengths(np.array(samples))
        whole = [source.stretch(sample, 0, int(n)) for sample, n in zip(samples, lengths, strict=True)]
        texts = [np.append(found.tokens, found.labels[-1]) for found in whole]
        by_rank = [
            iter(
                SliceReader(source, rank, slice_multiple, True, None).read(
                    PLAN, Sequences(lengths, samples, len(samples))
                )
            )
            for rank in range(4)
        ]
        for item in PLAN.micro_batches:
            slices = [next(by_rank[rank]) for rank in item.ranks]
            assert {part.first_rank for part in slices} == {item.first_rank}
            assert [part.layout.member for part in slices] == list(range(item.degree))
            size = sum(int(lengths[k]) for k in item.sequences)
            padding = [0] * (sum(len(part.positions) for part in slices) - size)
            assert all(len(part.positions) % slice_multiple == 0 for part in slices)

            def whole(name: str, parts: list = slices) -> list[int]:
                return [int(value) for part in parts for value in getattr(part, name)]

            held = [texts[k] for k in item.sequences]
            assert whole("tokens") == [token for text in held for token in text[:-1]] + padding
            assert whole("labels") == [token for text in held for token in text[1:]] + padding
            assert whole("loss_mask") == [1] * size + padding
            assert whole("positions") == [at for text in held for at in range(len(text) - 1)] + padding
        assert all(next(rest, None) is None for rest in by_rank)

    def test_reads_no_token_in_the_middle_of_a_pipeline(self, source: SampleSource) -> None:
        samples = range(FIRST_SAMPLE, FIRST_SAMPLE + 6)
        lengths = source.lengths(np.array(samples))
        full = SliceReader(source, 1, 1, True, None).read(PLAN, Sequences(lengths, samples, len(samples)))
        bare = SliceReader(source, 1, 1, False, None).read(PLAN, Sequences(lengths, samples, len(samples)))
        assert len(full) == len(bare) == 2
        for with_tokens, without in zip(full, bare, strict=True):
            assert (without.tokens, without.labels, without.loss_mask) == (None, None, None)
            assert without.layout == with_tokens.layout
            assert without.positions.tolist() == with_tokens.positions.tolist()
