"""Documents of real data sets as sequences: nothing is predicted twice, nothing is left out, order is the seed's."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron.documents import DocumentDataset, SampleSource
from megatron_flexsp.megatron.stored_documents import StoredDocuments
from tests.megatron.stored import configuration, open_documents, texts, write

DOCUMENTS = st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=8)
_fresh = itertools.count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("documents")


@given(documents=DOCUMENTS, sequence_length=st.integers(1, 12))
def test_every_token_but_a_documents_first_is_predicted_once(
    documents: list[list[int]], sequence_length: int, folder: Path
) -> None:
    assume(any(sum(lengths) > 1 for lengths in documents))
    prefix = folder / f"data{next(_fresh)}"
    written = write(prefix, documents)
    dataset = open_documents(prefix, sequence_length)
    owner = {token: document for document, tokens in enumerate(written) for token in tokens.tolist()}
    predicted = []
    for text in texts(dataset):
        assert 2 <= len(text) <= sequence_length + 1
        assert text == list(range(text[0], text[-1] + 1)), "a stretch of the file"
        assert owner[text[0]] == owner[text[-1]], "of one document"
        predicted += text[1:]
    assert sorted(predicted) == [token for tokens in written for token in tokens[1:].tolist()]
    samples = np.arange(len(dataset))
    assert dataset.lengths(samples).tolist() == [len(text) - 1 for text in texts(dataset)]
    assert dataset.longest == max(dataset.lengths(samples))


def test_only_the_beginning_of_a_document_is_kept_under_truncate(folder: Path) -> None:
    write(folder / "truncate", [[10], [3], [7]])
    dataset = open_documents(folder / "truncate", 6, overlong="truncate")
    assert sorted(texts(dataset)) == [[0, 1, 2, 3, 4, 5, 6], [10, 11, 12], [13, 14, 15, 16, 17, 18, 19]]


def test_overlong_documents_are_left_out_under_drop(folder: Path) -> None:
    write(folder / "drop", [[10], [3], [7], [8]])
    dataset = open_documents(folder / "drop", 6, overlong="drop")
    assert sorted(texts(dataset)) == [[10, 11, 12], [13, 14, 15, 16, 17, 18, 19]]
    assert dataset.longest == 6


def test_overlong_documents_are_refused_under_error(folder: Path) -> None:
    write(folder / "error", [[10], [3], [12], [8]])
    with pytest.raises(FlexSPError, match=r"document 2 has 11 tokens .* --seq-length 6, and so have 2 others"):
        open_documents(folder / "error", 6, overlong="error")
    assert len(open_documents(folder / "error", 11, overlong="error")) == 4


def test_a_document_may_be_made_of_several_sequences(folder: Path) -> None:
    write(folder / "sentences", [[2, 3], [], [1, 0, 4]])
    assert sorted(texts(open_documents(folder / "sentences", 20))) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize("empty", [[], [0], [0, 0]])
def test_empty_documents_are_skipped_wherever_they_stand(empty: list[int], folder: Path) -> None:
    """Upstream's preprocessing writes an empty text as a document without a sequence."""
    prefix = folder / f"empty{len(empty)}"
    write(prefix, [empty, [2], empty, empty, [3], empty])
    dataset = open_documents(prefix, 8)
    assert sorted(texts(dataset)) == [[0, 1], [2, 3, 4]]
    assert "6 documents -> 2 sequences" in dataset.describe()
    assert "4 with nothing to predict" in dataset.describe()


def test_what_documents_became_is_told(folder: Path) -> None:
    write(folder / "told", [[1], [0], [10], [4]])
    told = open_documents(folder / "told", 4).describe()
    assert "4 documents -> 4 sequences, longest 4 tokens" in told
    assert "2 with nothing to predict and skipped, 1 longer than --seq-length (split)" in told


def test_documents_that_predict_nothing_are_no_data_set(folder: Path) -> None:
    write(folder / "short", [[1], [1]])
    with pytest.raises(FlexSPError, match=r"short.*none of its 2 documents becomes a sequence"):
        open_documents(folder / "short", 8)


def test_any_stretch_of_a_sample_can_be_read(folder: Path) -> None:
    write(folder / "stretch", [[4, 6], [9]])
    dataset = open_documents(folder / "stretch", 4)
    for sample, text in enumerate(texts(dataset)):
        for start, stop in itertools.combinations(range(len(text) + 1), 2):
            assert dataset.read(sample, start, stop - start).tolist() == text[start:stop]


class TestOrder:
    def test_each_epoch_is_complete_and_in_an_order_of_its_own(self, folder: Path) -> None:
        write(folder / "epochs", [[length] for length in range(2, 22)])
        dataset = open_documents(folder / "epochs", 50, num_samples=41)
        epochs = [tuple(map(tuple, texts(dataset)[start : start + 20])) for start in (0, 20, 40)]
        assert len(dataset) == 60
        assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1
        assert len(set(epochs)) == 3
        assert epochs[0] != tuple(sorted(epochs[0]))

    def test_more_samples_never_reorder_the_earlier_ones(self, folder: Path) -> None:
        write(folder / "more", [[length] for length in range(2, 22)])
        shortest, *longer = (texts(open_documents(folder / "more", 50, num_samples=n)) for n in (5, 20, 21, 100))
        assert all(order[: len(shortest)] == shortest for order in longer)

    def test_the_seed_decides(self, folder: Path) -> None:
        write(folder / "seed", [[length] for length in range(2, 22)])
        first, again, other = (texts(open_documents(folder / "seed", 50, random_seed=s)) for s in (1, 1, 2))
        assert first == again
        assert first != other
        assert sorted(first) == sorted(other)


class TestBuilder:
    def test_blends_by_weight(self, folder: Path) -> None:
        write(folder / "many", [[n] for n in (3, 8, 2, 9, 4, 30)], first_token=0)
        write(folder / "few", [[n] for n in (5, 6, 7)], first_token=1000)
        blend = ([str(folder / "many"), str(folder / "few")], [0.75, 0.25])
        config = configuration(8, blend=blend, path_to_cache=str(folder / "blend_cache"))
        train, valid, _ = BlendedMegatronDatasetBuilder(DocumentDataset, [80, 0, 0], lambda: True, config).build()
        assert valid is None
        source = SampleSource(train)
        samples = np.arange(len(source))
        whole = [source.stretch(k, 0, int(length)) for k, length in zip(samples, source.lengths(samples), strict=True)]
        read = [np.append(found.tokens, found.labels[-1]) for found in whole]
        assert [len(text) - 1 for text in read] == source.lengths(samples).tolist()
        assert all((np.diff(text) == 1).all() for text in read)
        from_few = np.cumsum([text[0] >= 1000 for text in read])
        assert len(source) >= 80
        # At every point of training, not only at its end, the share is the weight to within one sample.
        assert np.abs(from_few - 0.25 * (samples + 1)).max() <= 1
        assert [part.name.split("/")[-1] for part in source.parts] == ["many (train)", "few (train)"]

    def test_no_document_is_in_two_splits(self, folder: Path) -> None:
        written = write(folder / "splits", [[n] for n in range(2, 22)])
        config = configuration(6, blend=([str(folder / "splits")], None), split="80,15,5")
        splits = BlendedMegatronDatasetBuilder(DocumentDataset, [1, 1, 1], lambda: True, config).build()
        predicted = [sorted(token for text in texts(split) for token in text[1:]) for split in splits]
        expected = [
            [int(token) for tokens in written[part] for token in tokens[1:]]
            for part in (slice(0, 16), slice(16, 19), slice(19, 20))
        ]
        assert predicted == expected


class TestCache:
    def test_is_used_by_the_next_run(self, folder: Path, tmp_path: Path) -> None:
        write(folder / "kept", [[5], [9], [2]])
        first = texts(open_documents(folder / "kept", 4, path_to_cache=str(tmp_path)))
        files = {file.name: file.stat().st_ino for file in tmp_path.iterdir()}
        assert len(files) == 2
        assert texts(open_documents(folder / "kept", 4, path_to_cache=str(tmp_path))) == first
        assert {file.name: file.stat().st_ino for file in tmp_path.iterdir()} == files

    @pytest.mark.parametrize("age_seconds", [-3600, 3600])
    def test_follows_a_data_set_that_was_made_again(self, age_seconds: int, tmp_path: Path) -> None:
        """Also one that was copied over with its own, older time."""
        prefix = tmp_path / "data"
        write(prefix, [[5], [9], [2]])
        open_documents(prefix, 4)
        write(prefix, [[2], [9], [5]])
        changed = (tmp_path / "data.idx").stat().st_mtime - age_seconds
        os.utime(f"{prefix}.idx", (changed, changed))
        predicted = [token for text in texts(open_documents(prefix, 4)) for token in text[1:]]
        assert sorted(predicted) == [1, *range(3, 11), *range(12, 16)]

    def test_that_cannot_be_written_names_the_flag(self, folder: Path, tmp_path: Path) -> None:
        write(folder / "unwritable", [[5]])
        (tmp_path / "file").touch()
        with pytest.raises(FlexSPError, match=r"--data-cache-path"):
            open_documents(folder / "unwritable", 4, path_to_cache=str(tmp_path / "file"))


class TestBrokenFiles:
    @pytest.fixture
    def prefix(self, tmp_path: Path) -> Path:
        write(tmp_path / "data", [[], [5, 2], [9], [0]])
        return tmp_path / "data"

    @pytest.mark.parametrize("suffix", [".idx", ".bin"])
    def test_missing(self, suffix: str, prefix: Path) -> None:
        os.remove(f"{prefix}{suffix}")
        with pytest.raises(FlexSPError, match=rf"--data-path {prefix}: {prefix}{suffix} is missing"):
            StoredDocuments(str(prefix))

    @pytest.mark.parametrize("suffix", [".idx", ".bin"])
    def test_truncated_anywhere(self, suffix: str, prefix: Path) -> None:
        path = Path(f"{prefix}{suffix}")
        whole = path.read_bytes()
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            with pytest.raises(FlexSPError, match=rf"--data-path {prefix}: {path} has {size} bytes .* truncated"):
                StoredDocuments(str(prefix))
        path.write_bytes(whole)
        assert len(StoredDocuments(str(prefix))) == 4

    def test_no_index_at_all(self, prefix: Path) -> None:
        Path(f"{prefix}.idx").write_text("{}" * 100)
        with pytest.raises(FlexSPError, match=rf"{prefix}.idx is no Megatron index"):
            StoredDocuments(str(prefix))

    @pytest.mark.parametrize("documents", [[], [[], [0]]])
    def test_without_any_token(self, documents: list[list[int]], tmp_path: Path) -> None:
        write(tmp_path / "data", documents)
        with pytest.raises(FlexSPError, match=r"data.idx lists no tokens"):
            StoredDocuments(str(tmp_path / "data"))
