"""What is written is what Megatron reads; a run that ends early leaves nothing behind."""

import argparse
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.prepare import MEGATRON_TOKENIZER_ARGUMENTS, write_dataset
from megatron_flexsp.prepare.dataset import END_OF_DOCUMENT
from megatron_flexsp.prepare.sources import Record


def records(*documents: bytes) -> list[Record]:
    return [Record(document, len(document)) for document in documents]


def test_megatron_reads_back_the_bytes_and_the_end_of_each_document(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = [b"short", b"", bytes(range(256)) * 3, "ö€".encode(), b""]
    progress: list[int] = []
    summary = write_dataset(records(*documents), tmp_path / "new folder" / "set", progress.append)

    dataset = IndexedDataset(str(tmp_path / "new folder" / "set"))
    expected = [[*document, END_OF_DOCUMENT] for document in documents if document]
    assert [dataset[index].tolist() for index in range(len(dataset))] == expected
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]
    assert summary.document_tokens.tolist() == [len(tokens) for tokens in expected]
    assert (summary.documents, summary.tokens, summary.skipped_documents) == (3, 6 + 769 + 6, 2)
    assert progress == [len(document) for document in documents]


def test_megatron_builds_a_tokenizer_with_the_same_end_of_document() -> None:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    type_flag, tokenizer_type, size_flag, vocab_size = MEGATRON_TOKENIZER_ARGUMENTS
    assert (type_flag, size_flag) == ("--tokenizer-type", "--vocab-size")
    arguments = argparse.Namespace(
        tokenizer_type=tokenizer_type,
        vocab_size=int(vocab_size),
        pad_vocab_size=True,
        make_vocab_size_divisible_by=128,
        tensor_model_parallel_size=1,
        rank=0,
    )
    tokenizer = build_tokenizer(arguments)
    assert tokenizer.eod == END_OF_DOCUMENT
    assert tokenizer.vocab_size == END_OF_DOCUMENT + 1


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_dataset(records(b"one", b"two" * 100), tmp_path / name)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"first{suffix}").read_bytes() == (tmp_path / f"second{suffix}").read_bytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), FlexSPError("bad line"), RuntimeError("bug")])
def test_nothing_is_left_when_the_source_fails(tmp_path: Path, error: BaseException) -> None:
    def failing() -> Iterator[Record]:
        yield Record(b"one", 3)
        raise error

    with pytest.raises(type(error)):
        write_dataset(failing(), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_rejects_a_prefix_that_is_taken_and_keeps_its_files(tmp_path: Path) -> None:
    (tmp_path / "set.bin").write_text("mine")
    with pytest.raises(FlexSPError, match=r"set\.bin exists: delete it or choose another --output-prefix"):
        write_dataset(records(b"one"), tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["set.bin"]


def test_rejects_a_source_without_any_text(tmp_path: Path) -> None:
    with pytest.raises(FlexSPError, match=r"no document has text \(2 are empty\)"):
        write_dataset(records(b"", b""), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_rejects_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FlexSPError, match="cannot write"):
        write_dataset(records(b"one"), tmp_path / "file" / "set")


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    write_dataset(records(b"imports Megatron"), tmp_path / "warm-up")
    document = bytes(100_000)
    tracemalloc.start()
    try:
        write_dataset((Record(document, len(document)) for _ in range(300)), tmp_path / "set")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "set.bin").stat().st_size > 60_000_000
    assert peak_bytes < 3_000_000


def test_needs_megatron_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.indexed_dataset", None)
    with pytest.raises(FlexSPError, match=r"needs Megatron-LM .*pip install 'megatron-flexsp\[train\]'"):
        write_dataset(records(b"one"), tmp_path / "set")


def test_lengths_are_exact_beyond_two_to_the_thirty_first_in_sum(tmp_path: Path) -> None:
    summary = write_dataset(records(b"a"), tmp_path / "set")
    large = np.full(3, 2**30, dtype=np.int32)
    assert type(summary)(large, 0).tokens == 3 * 2**30
