"""Documents of a Megatron data set as sequences: which piece of which document a sample is, and how long.

Goes through megatron.core's own builders, so that blends, splits, epochs and seeds mean what they mean in
any Megatron run. Lengths come from the index; tokens are read only for the slice that a rank needs.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.object_storage_utils import ObjectStorageConfig, is_object_storage_path
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron.mock_documents import MockDocuments

Lengths = NDArray[np.int64]

# An index: magic, version, type of a token, how many sequences, how many documents and one; then each
# sequence's length, each one's place in the .bin, and each document's first sequence.
_INDEX_MAGIC = b"MMIDIDX"
_INDEX_HEADER = struct.Struct("<9sQBQQ")
_LENGTH, _POINTER = struct.Struct("<i"), struct.Struct("<q")


@dataclass
class DocumentDatasetConfig(BlendedMegatronDatasetConfig):
    """What the documents of a data set become."""

    overlong: str = "split"
    """``--flexsp-overlong``"""

    mock_documents: MockDocuments | None = None
    """Stands in for files under ``--mock-data``."""

    object_storage_cache_path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mock:
            # Megatron gives each split a third of the documents; here each may have all of them.
            self.split_matrix = [(0.0, 1.0)] * len(Split)


class StoredDocuments:
    """The documents of one ``.bin``/``.idx`` pair: their lengths, and any stretch of their tokens."""

    def __init__(self, prefix: str, config: DocumentDatasetConfig) -> None:
        try:
            if is_object_storage_path(prefix):
                storage = ObjectStorageConfig(path_to_idx_cache=config.object_storage_cache_path)
                self._indexed = IndexedDataset(prefix, mmap=False, object_storage_config=storage)
            else:
                _check_files(prefix)
                self._indexed = IndexedDataset(prefix, mmap=config.mmap_bin_files)
        except FlexSPError as error:
            raise FlexSPError(f"--data-path {prefix}: {error}") from None
        except Exception as error:  # a broken index shows in many ways
            raise FlexSPError(
                f"--data-path {prefix}: {prefix}.idx and .bin can't be read ({error}). Make the data set again"
            ) from None
        self._first_sequences = np.asarray(self._indexed.document_indices)

    def __len__(self) -> int:
        return len(self._first_sequences) - 1

    def token_counts(self, documents: NDArray[np.int64]) -> Lengths:
        """Tokens of each of the documents. A document's sequences lie side by side on disk."""
        index = self._indexed.index
        first, last = self._first_sequences[documents], self._first_sequences[documents + 1] - 1
        # An empty text becomes a document without sequences, even as the first or the last of a data set.
        filled = np.flatnonzero(first <= last)
        first, last = first[filled], last[filled]
        before_last = (index.sequence_pointers[last] - index.sequence_pointers[first]) // index.dtype_size
        counts = np.zeros(len(documents), dtype=np.int64)
        counts[filled] = before_last + index.sequence_lengths[last]
        return counts

    def read(self, document: int, start: int, count: int) -> NDArray[Any]:
        """``count`` tokens of a document from ``start``."""
        return self._indexed.get(int(self._first_sequences[document]), offset=start, length=count)


def _check_files(prefix: str) -> None:
    """Refuse files that are missing or cut off. Megatron's reader would fail halfway, and leave stacks behind."""
    index_path, data_path = f"{prefix}.idx", f"{prefix}.bin"
    for path in (index_path, data_path):
        if not os.path.isfile(path):
            raise FlexSPError(f"{path} is missing; give the path of the data set without .idx or .bin")
    with open(index_path, "rb") as stream:
        header = stream.read(_INDEX_HEADER.size)
        if not header.startswith(_INDEX_MAGIC[: len(header)]):
            raise FlexSPError(f"{index_path} is no Megatron index; make the data set again")
        sequences = documents = 0
        needed = _INDEX_HEADER.size
        if len(header) == needed:
            _, _, dtype_code, sequences, documents = _INDEX_HEADER.unpack(header)
            needed += sequences * (_LENGTH.size + _POINTER.size) + documents * _POINTER.size
        found = os.path.getsize(index_path)
        if found < needed:
            raise FlexSPError(
                f"{index_path} has {found} bytes where its header needs {needed}; it is truncated. Copy or make it "
                "again"
            )
        needed = 0
        if sequences:
            stream.seek(_INDEX_HEADER.size + (sequences - 1) * _LENGTH.size)
            (length,) = _LENGTH.unpack(stream.read(_LENGTH.size))
            stream.seek((sequences - 1) * _POINTER.size, os.SEEK_CUR)
            (pointer,) = _POINTER.unpack(stream.read(_POINTER.size))
            needed = pointer + length * DType.size(DType.dtype_from_code(dtype_code))
    if documents < 2 or needed == 0:
        raise FlexSPError(f"{index_path} lists no tokens; make the data set again")
    found = os.path.getsize(data_path)
    if found < needed:
        raise FlexSPError(
            f"{data_path} has {found} bytes where its index needs {needed}; it is truncated. Copy or make it again"
        )


def _refuse_overlong(documents: StoredDocuments | MockDocuments, name: str, limit: int) -> None:
    """Every rank looks for itself: an error on the one that builds a split first would leave the others waiting."""
    predicted = documents.token_counts(np.arange(len(documents))) - 1
    others = np.count_nonzero(predicted > limit) - 1
    if others < 0:
        return
    worst = int(np.argmax(predicted))
    raise FlexSPError(
        f"{name}: document {worst} has {predicted[worst]} tokens to predict, more than --seq-length {limit}, and so "
        f"have {others} others. Raise --seq-length, or choose --flexsp-overlong split, truncate or drop"
    )


class DocumentDataset(MegatronDataset):
    """One split of one data set; sample i is a piece of a document, in shuffled order.

    A piece of n tokens predicts n tokens: it reads tokens ``[start, start + n]`` of its document and the
    next piece begins where its last label stands. So every token but a document's first is predicted once.
    """

    config: DocumentDatasetConfig
    dataset: StoredDocuments | MockDocuments

    def __init__(
        self,
        dataset: StoredDocuments | MockDocuments,
        dataset_path: str | None,
        indices: NDArray[Any],
        num_samples: int | None,
        index_split: Split,
        config: DocumentDatasetConfig,
    ) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        self._first_document = int(indices[0]) if len(indices) else 0
        self.name = f"{dataset_path or 'mock data'} ({index_split.name})"
        self._piece_ends = self._kept("piece_ends", self._count_pieces)
        self._pieces = int(self._piece_ends[-1]) if len(indices) else 0
        self._order = self._kept(f"order_of_{self._pieces}", self._shuffle)

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: StoredDocuments | MockDocuments) -> int:
        return len(low_level_dataset)

    @staticmethod
    def build_low_level_dataset(
        dataset_path: str | None, config: DocumentDatasetConfig
    ) -> StoredDocuments | MockDocuments:
        documents: StoredDocuments | MockDocuments
        if dataset_path is None:
            assert config.mock_documents is not None
            documents = config.mock_documents
        else:
            documents = StoredDocuments(dataset_path, config)
        if config.overlong == "error":
            _refuse_overlong(documents, dataset_path or "mock data", config.sequence_length)
        return documents

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return ["random_seed", "sequence_length", "split", "split_matrix", "overlong"]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, idx: int) -> dict[str, NDArray[Any]]:
        """The whole sample, as PyTorch's tools expect it; training reads slices."""
        samples = np.array([idx])
        return {"text": self.read(idx, 0, int(self.lengths(samples)[0]) + 1)}

    def lengths(self, samples: NDArray[np.int64]) -> Lengths:
        """Tokens that each of the samples feeds to the model; as many are predicted."""
        documents, starts = self._locate(samples)
        predicted = self.dataset.token_counts(self._first_document + documents) - 1
        return np.minimum(predicted - starts, self.config.sequence_length)

    def read(self, sample: int, start: int, count: int) -> NDArray[Any]:
        """``count`` tokens of a sample from ``start``; a sample of n tokens has n + 1, the last one a label."""
        documents, starts = self._locate(np.array([sample]))
        return self.dataset.read(self._first_document + int(documents[0]), int(starts[0]) + start, count)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        predicted, limit = self._predicted(), self.config.sequence_length
        if self.config.overlong == "drop":
            predicted = predicted[predicted <= limit]
        return min(int(predicted.max(initial=0)), limit)

    def describe(self) -> str:
        """One line on what its documents became."""
        predicted = self._predicted()
        short = np.count_nonzero(predicted < 1)
        overlong = np.count_nonzero(predicted > self.config.sequence_length)
        return (
            f"{self.name}: {len(predicted):,} documents -> {self._pieces:,} sequences, longest {self.longest:,} "
            f"tokens; {short:,} too short to predict anything and skipped, {overlong:,} longer than --seq-length "
            f"({self.config.overlong})"
        )

    def _locate(self, samples: NDArray[np.int64]) -> tuple[Lengths, Lengths]:
        """Each sample's document (counted from the split's first) and the token that its piece begins at."""
        pieces = np.asarray(self._order[samples], dtype=np.int64)
        documents = np.searchsorted(self._piece_ends, pieces, side="right")
        pieces_before = np.where(documents > 0, self._piece_ends[documents - 1], 0)
        return documents, (pieces - pieces_before) * self.config.sequence_length

    def _predicted(self) -> Lengths:
        """Tokens that each document of the split has to predict."""
        documents = np.arange(self._first_document, self._first_document + len(self.indices))
        return self.dataset.token_counts(documents) - 1

    def _count_pieces(self) -> Lengths:
        """How many sequences the documents up to each one become."""
        predicted, limit = self._predicted(), self.config.sequence_length
        too_long = predicted > limit
        if self.config.overlong in ("split", "error"):
            pieces = np.maximum(-(-predicted // limit), 0)
        else:
            pieces = (predicted >= 1).astype(np.int64)
            if self.config.overlong == "drop":
                pieces[too_long] = 0
        if not pieces.any() and (self.num_samples or self.index_split is Split.train):
            raise FlexSPError(
                f"{self.name}: none of its {len(predicted)} documents becomes a sequence: each has fewer than two "
                f"tokens, or more than --seq-length {limit} under --flexsp-overlong {self.config.overlong}"
            )
        return np.cumsum(pieces)

    def _shuffle(self) -> NDArray[Any]:
        """The order of the samples: whole epochs, each in an order of its own, as many as are needed."""
        epochs = 1
        if self._pieces and self.num_samples is not None:
            epochs = max(1, -(-self.num_samples // self._pieces))
        dtype = np.int32 if self._pieces <= np.iinfo(np.int32).max else np.int64
        order = np.empty(epochs * self._pieces, dtype=dtype)
        for epoch in range(epochs):
            # A generator for each epoch: asking for more samples never reorders the ones before.
            generator = np.random.default_rng([self.config.random_seed, self.index_split.value, epoch])
            order[epoch * self._pieces : (epoch + 1) * self._pieces] = generator.permutation(self._pieces)
        return order

    def _kept(self, what: str, build: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """An array from the cache folder, where ranks of a node share it, as Megatron keeps its indices."""
        if self.dataset_path is None:
            return build()
        folder = self.config.path_to_cache or os.path.join(self.dataset_path, "cache", type(self).__name__ + "_indices")
        name = f"{self.unique_description_hash}-{_edition(self.dataset_path)}-{self.index_split.name}-{what}.npy"
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            _save_whole(path, build())
        return np.load(path, mmap_mode="r")


def _edition(prefix: str) -> str:
    """Tells a data set from one that was made again, or copied, under the same name."""
    if is_object_storage_path(prefix):
        return "stored"
    status = os.stat(prefix + ".idx")
    return f"{status.st_size:x}-{status.st_mtime_ns:x}"


def _save_whole(path: str, array: NDArray[Any]) -> None:
    """Ranks of several nodes may write at once, and any may be killed: rename only what is complete."""
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=folder, suffix=".part")
        with os.fdopen(descriptor, "wb") as stream:
            np.save(stream, array)
        os.replace(temporary, path)
    except OSError as error:
        raise FlexSPError(
            f"the data set's indices can't be written to {folder} ({error.strerror}): give --data-cache-path a "
            "writable folder"
        ) from None


class SampleSource:
    """Lengths and tokens of samples, whether they come from one data set or from a blend."""

    def __init__(self, dataset: DocumentDataset | BlendedDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def name(self) -> str:
        """What errors call it."""
        return " + ".join(part.name for part in self.parts)

    @property
    def parts(self) -> list[DocumentDataset]:
        """The data sets behind it."""
        return list(self._dataset.datasets) if isinstance(self._dataset, BlendedDataset) else [self._dataset]

    def lengths(self, samples: NDArray[np.int64]) -> Lengths:
        """Tokens of each of the samples."""
        if not isinstance(self._dataset, BlendedDataset):
            return self._dataset.lengths(samples)
        part_of, sample_in_part = (
            self._dataset.dataset_index[samples],
            self._dataset.dataset_sample_index[samples],
        )
        lengths = np.empty(len(samples), dtype=np.int64)
        for part in np.unique(part_of):
            chosen = part_of == part
            lengths[chosen] = self._dataset.datasets[part].lengths(np.asarray(sample_in_part[chosen], dtype=np.int64))
        return lengths

    def read(self, sample: int, start: int, count: int) -> NDArray[Any]:
        """``count`` tokens of a sample from ``start``."""
        if not isinstance(self._dataset, BlendedDataset):
            return self._dataset.read(sample, start, count)
        part = self._dataset.datasets[self._dataset.dataset_index[sample]]
        return part.read(int(self._dataset.dataset_sample_index[sample]), start, count)
