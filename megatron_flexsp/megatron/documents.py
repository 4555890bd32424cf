"""Documents of a Megatron data set as sequences: which piece of which document a sample is, and how long.

Goes through megatron.core's own builders, so that blends, splits, epochs and seeds mean what they mean in
any Megatron run. Lengths come from the index; tokens are read only for the slice that a rank needs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron.conversations import Conversations
from megatron_flexsp.megatron.mock_documents import MockDocuments
from megatron_flexsp.megatron.plan_channel import PlanChannel
from megatron_flexsp.megatron.sequences import Sequences, Stretch
from megatron_flexsp.megatron.stored_documents import Lengths, StoredDocuments

Documents = StoredDocuments | MockDocuments


@dataclass
class DocumentDatasetConfig(BlendedMegatronDatasetConfig):
    """What the documents of a data set become."""

    overlong: str = "split"
    """``--flexsp-overlong``"""

    mock_documents: MockDocuments | None = None
    """Stands in for files under ``--mock-data``."""

    conversations: dict[str, str] | None = None
    """Under ``--sft``: where each file's conversations are kept, tokenised."""

    object_storage_cache_path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mock:
            # Megatron gives each split a third of the documents; here each may have all of them.
            self.split_matrix = [(0.0, 1.0)] * len(Split)


def _refuse_overlong(documents: Documents, name: str, limit: int) -> None:
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
    dataset: Documents

    def __init__(
        self,
        dataset: Documents,
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
    def numel_low_level_dataset(low_level_dataset: Documents) -> int:
        return len(low_level_dataset)

    @staticmethod
    def build_low_level_dataset(dataset_path: str | None, config: DocumentDatasetConfig) -> Documents:
        documents: Documents
        if dataset_path is None:
            assert config.mock_documents is not None
            documents = config.mock_documents
        elif config.conversations is not None:
            documents = Conversations(config.conversations[dataset_path], config.sequence_length)
        else:
            documents = StoredDocuments(
                dataset_path, memory_map=config.mmap_bin_files, index_cache=config.object_storage_cache_path
            )
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

    def learned(self, sample: int, start: int, count: int) -> NDArray[np.bool_] | None:
        """Which of those tokens count as labels; None: all of them, which is so for all but conversations."""
        if not isinstance(self.dataset, Conversations):
            return None
        documents, starts = self._locate(np.array([sample]))
        return self.dataset.learned(self._first_document + int(documents[0]), int(starts[0]) + start, count)

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
        noun = "documents" if self.config.conversations is None else "conversations"
        return (
            f"{self.name}: {len(predicted):,} {noun} -> {self._pieces:,} sequences, longest {self.longest:,} "
            f"tokens; {short:,} with nothing to predict and skipped, {overlong:,} longer than --seq-length "
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
        kept = self.config.conversations
        prefix = self.dataset_path if kept is None else kept[self.dataset_path]
        folder = self.config.path_to_cache or os.path.join(prefix, "cache", type(self).__name__ + "_indices")
        name = f"{self.unique_description_hash}-{_edition(prefix)}-{self.index_split.name}-{what}.npy"
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
    """Lengths and tokens of samples, whether they come from one data set or from a blend.

    A sample is a sequence, and its number the sequence's handle.
    """

    has_index = True

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

    def sequences(self, samples: Sequence[int], channel: PlanChannel) -> Sequences:
        """The samples themselves; every rank knows their lengths from the index."""
        return Sequences(self.lengths(np.asarray(samples, dtype=np.int64)), samples, len(samples))

    def prepare(self, handles: Iterable[int]) -> None:
        """Nothing: the operating system reads ahead."""

    def stretch(self, handle: int, start: int, count: int) -> Stretch:
        """``count`` tokens of a sample from ``start``, each with the one after it as its label."""
        part, sample = self._part_of(handle)
        text = part.read(sample, start, count + 1)
        return Stretch(text[:-1], text[1:], part.learned(sample, start + 1, count))

    def learned(self, handle: int, length: int) -> NDArray[np.bool_] | None:
        """Which labels of a sample of so many tokens count; None: all."""
        part, sample = self._part_of(handle)
        return part.learned(sample, 1, length)

    def _part_of(self, sample: int) -> tuple[DocumentDataset, int]:
        """The data set that holds a sample, and its number there."""
        if not isinstance(self._dataset, BlendedDataset):
            return self._dataset, sample
        part = self._dataset.datasets[self._dataset.dataset_index[sample]]
        return part, int(self._dataset.dataset_sample_index[sample])
