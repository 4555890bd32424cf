"""Packs of a data set as sequences: what is read and kept, and what is noticed. With more ranks: test_plan_channel."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron import packed_source
from megatron_flexsp.megatron.packed_samples import Unpacking
from megatron_flexsp.megatron.packed_source import PackedSource, unpacking
from megatron_flexsp.megatron.sequences import Sequences
from tests.megatron.packs import Packs


class Alone:
    """The channel of a single rank."""

    rank, size = 0, 1

    def together[T](self, call: Callable[[], T]) -> T:
        return call()

    def sum(self, values: np.ndarray) -> np.ndarray:
        return values


def source_of(data: Packs) -> PackedSource:
    return PackedSource(data, "packs", Unpacking(longest=64, positions_count=False, unlearned_count=False))


def sequences_of(source: PackedSource, samples: Any) -> Sequences:
    return source.sequences(samples, Alone())  # type: ignore[arg-type]


def test_stretches_are_the_samples_own_and_each_sample_is_read_once() -> None:
    source = source_of(data := Packs())
    found = sequences_of(source, [4, 2, 4])
    assert found.lengths.tolist() == [1, 2, 3, 4, 1, 2, 1, 2, 3, 4]
    source.prepare(found.handles)
    part = source.stretch(found.handles[3], 1, 2)
    assert (part.tokens.tolist(), part.labels.tolist()) == ([407, 408], [414, 415])
    assert source.stretch(found.handles[5], 0, 2).tokens.tolist() == [201, 202]
    assert data.reads == [4, 2]


def test_what_is_needed_stays_however_little_room_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_source, "_CACHE_BYTES", 1)
    source = source_of(data := Packs())
    found = sequences_of(source, range(3, 6))
    sequences_of(source, range(7, 9))
    source.prepare(found.handles)
    assert [source.stretch(handle, 0, 1).tokens[0] // 100 for handle in found.handles] == [3] * 3 + [4] * 4 + [5] * 5
    assert data.reads == [3, 4, 5, 7, 8, 3, 4, 5]


def test_a_batch_with_nothing_to_learn_runs_one_token() -> None:
    source = source_of(Packs(learned=False))
    found = sequences_of(source, range(2, 5))
    source.prepare(found.handles)
    assert found.lengths.tolist() == [1]
    part = source.stretch(found.handles[0], 0, 1)
    assert part.tokens.tolist() == [200]
    assert not part.learned.any()


def test_a_sample_that_changed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_source, "_CACHE_BYTES", 1)
    source = source_of(data := Packs())
    found = sequences_of(source, [3])
    sequences_of(source, [5])
    monkeypatch.setattr(data, "_learned", False)
    with pytest.raises(FlexSPError, match="packs: sample 3 is not what it was"):
        source.prepare(found.handles)


def test_an_error_of_the_data_set_says_where() -> None:
    with pytest.raises(FlexSPError, match=r"packs: sample 4 can't be read: OSError: a disk is gone \(.*packs.py, line"):
        sequences_of(source_of(Packs(broken=4)), range(3, 6))


@pytest.mark.parametrize(
    ("coefficients", "counts"), [(0.0, False), ([0.0], False), (0.01, True), ([0.0, 0.1], True), (None, False)]
)
def test_ends_without_labels_count_where_experts_are_balanced(coefficients: Any, counts: bool) -> None:
    args = SimpleNamespace(seq_length=8, position_embedding_type="rope", num_experts=4, moe_z_loss_coeff=None)
    args.moe_aux_loss_coeff, args.moe_router_enable_expert_bias = coefficients, False
    assert unpacking(args).unlearned_count == counts
    args.num_experts = None
    assert not unpacking(args).unlearned_count
