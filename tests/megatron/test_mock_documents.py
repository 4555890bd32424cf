"""Documents for ``--mock-data``: the lengths that were asked for, and tokens that are the same on every rank."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.utils import Split

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron.documents import DocumentDataset
from megatron_flexsp.megatron.mock_documents import MockDocuments, mock_lengths
from tests.megatron.stored import configuration, texts


def test_without_a_specification_every_sequence_is_full() -> None:
    assert set(mock_lengths(None, 96, seed=1)) == {96}


def test_lognormal_lengths_have_the_mean_and_the_bounds_asked_for() -> None:
    lengths = mock_lengths("lognormal:mean=1000,sigma=0.5,min=1,max=100000", 8192, seed=1)
    assert lengths.mean() == pytest.approx(1000, rel=0.02)
    assert np.log(lengths).std() == pytest.approx(0.5, rel=0.02)
    cut = mock_lengths("lognormal:max=8192,min=128,sigma=1.5,mean=1024", 8192, seed=1)
    assert (cut.min(), cut.max()) == (128, 8192)


def test_the_seed_decides() -> None:
    spec = "lognormal:mean=1000,sigma=1,min=1,max=100000"
    first, again, other = (mock_lengths(spec, 64, seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_lengths_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "lengths.txt").write_text("12\n7\n\n3\n")
    assert mock_lengths(str(tmp_path / "lengths.txt"), 64, seed=1).tolist() == [12, 7, 3]


@pytest.mark.parametrize(
    "values",
    [
        "",
        "mean=10",
        "mean=10,sigma=1,min=1,max=20,more=3",
        "mean=ten,sigma=1,min=1,max=20",
        "mean=10,sigma=-1,min=1,max=20",
        "mean=10,sigma=1,min=0,max=20",
        "mean=10,sigma=1,min=30,max=20",
        "mean=30,sigma=1,min=1,max=20",
        "mean=nan,sigma=1,min=1,max=20",
        "mean=inf,sigma=1,min=1,max=inf",
        "mean=10,sigma=inf,min=1,max=20",
    ],
)
def test_a_bad_lognormal_is_refused(values: str) -> None:
    with pytest.raises(FlexSPError, match=r"--flexsp-mock-lengths lognormal:.*: expected mean, sigma"):
        mock_lengths(f"lognormal:{values}", 64, seed=1)


@pytest.mark.parametrize("text", ["", "12\n-1\n", "0\n", "12 tokens\n", "1.5\n", "1" * 30])
def test_a_bad_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text(text)
    with pytest.raises(FlexSPError, match=f"--flexsp-mock-lengths {path}"):
        mock_lengths(str(path), 64, seed=1)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FlexSPError, match=rf"--flexsp-mock-lengths {tmp_path}/none: .*can be read"):
        mock_lengths(f"{tmp_path}/none", 64, seed=1)


def test_a_sequence_has_the_length_asked_for_and_can_be_learned() -> None:
    mock = MockDocuments(np.array([3, 10, 1]), vocabulary=7)
    dataset = DocumentDataset(mock, None, np.arange(3), None, Split.train, configuration(6))
    found = texts(dataset)
    assert sorted(dataset.lengths(np.arange(len(dataset)))) == [1, 3, 4, 6]
    assert sorted(len(text) - 1 for text in found) == [1, 3, 4, 6]
    assert all((after - before) % 7 == 1 for text in found for before, after in itertools.pairwise(text))
