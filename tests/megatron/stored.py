"""Small data sets on disk, in which every token tells where it stands."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

from megatron_flexsp.megatron.documents import DocumentDataset, DocumentDatasetConfig

Documents = Sequence[Sequence[int]]
"""The lengths of each document's sequences; Megatron's preprocessing makes one of each text or of each sentence."""


def write(prefix: Path, documents: Documents, first_token: int = 0) -> list[np.ndarray]:
    """Write ``prefix.bin`` and ``prefix.idx``; tokens count upwards. Return each document's tokens."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    written = []
    for lengths in documents:
        tokens = np.arange(first_token, first_token + sum(lengths))
        builder.add_document(torch.from_numpy(tokens), list(lengths))
        written.append(tokens)
        first_token += len(tokens)
    builder.finalize(f"{prefix}.idx")
    return written


def configuration(sequence_length: int, **options: Any) -> DocumentDatasetConfig:
    """A configuration; the builder's own checks want a blend, even where no builder is used."""
    options = {"random_seed": 3, "blend": (["unused"], None), "split": "100,0,0", **options}
    return DocumentDatasetConfig(sequence_length=sequence_length, **options)


def open_documents(
    prefix: Path, sequence_length: int, num_samples: int | None = None, **options: Any
) -> DocumentDataset:
    """All documents of one data set, as the training split."""
    config = configuration(sequence_length, **options)
    stored = DocumentDataset.build_low_level_dataset(str(prefix), config)
    return DocumentDataset(stored, str(prefix), np.arange(len(stored)), num_samples, Split.train, config)


def texts(dataset: DocumentDataset) -> list[list[int]]:
    """The tokens of all samples, in order."""
    return [dataset[sample]["text"].tolist() for sample in range(len(dataset))]
