"""Documents in Megatron's files: how long each is, and any stretch of its tokens."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from megatron.core.datasets.object_storage_utils import ObjectStorageConfig, is_object_storage_path
from numpy.typing import NDArray

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.indexed_files import HEADER_BYTES, LENGTH_BYTES, MAGIC, POINTER_BYTES, IndexHeader

Lengths = NDArray[np.int64]


class StoredDocuments:
    """The documents of one ``.bin``/``.idx`` pair: their lengths, and any stretch of their tokens."""

    def __init__(self, prefix: str, *, memory_map: bool = True, index_cache: str | None = None) -> None:
        """``memory_map`` is ``--mmap-bin-files``; ``index_cache`` is where an object store's index is copied to."""
        try:
            if is_object_storage_path(prefix):
                storage = ObjectStorageConfig(path_to_idx_cache=index_cache)
                self._indexed = IndexedDataset(prefix, mmap=False, object_storage_config=storage)
            else:
                check_files(prefix)
                self._indexed = IndexedDataset(prefix, mmap=memory_map)
        except FlexSPError as error:
            raise FlexSPError(f"--data-path {prefix}: {error.found}", error.remedy) from None
        except Exception as error:  # a broken index shows in many ways
            raise FlexSPError(
                f"--data-path {prefix}: {prefix}.idx and .bin can't be read ({error})", "make the data set again"
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


def check_files(prefix: str) -> None:
    """Refuse files that are missing or cut off. Megatron's reader would fail halfway, and leave stacks behind.

    Raises
    ------
    FlexSPError
        Names the file, what it has and what it needs.
    """
    index_path, data_path = f"{prefix}.idx", f"{prefix}.bin"
    for path in (index_path, data_path):
        if not os.path.isfile(path):
            raise FlexSPError(f"{path} is missing", "give the path of the data set without .idx or .bin")
    needed = 0
    with open(index_path, "rb") as stream:
        start = stream.read(HEADER_BYTES)
        if not start.startswith(MAGIC[: len(start)]):
            raise FlexSPError(f"{index_path} is no Megatron index", "make the data set again")
        header = IndexHeader.of(start) if len(start) == HEADER_BYTES else None
        expected, found = HEADER_BYTES if header is None else header.index_bytes, os.path.getsize(index_path)
        if header is None or found < expected:
            raise FlexSPError(
                f"{index_path} has {found} bytes where its header needs {expected}; it is truncated",
                "copy or make it again",
            )
        documents = header.bounds - 1
        if header.sequences:
            stream.seek(HEADER_BYTES + (header.sequences - 1) * LENGTH_BYTES)
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little", signed=True)
            stream.seek((header.sequences - 1) * POINTER_BYTES, os.SEEK_CUR)
            pointer = int.from_bytes(stream.read(POINTER_BYTES), "little", signed=True)
            needed = pointer + length * DType.size(DType.dtype_from_code(header.dtype_code))
    if documents < 1 or needed == 0:
        raise FlexSPError(f"{index_path} lists no tokens", "make the data set again")
    found = os.path.getsize(data_path)
    if found < needed:
        raise FlexSPError(
            f"{data_path} has {found} bytes where its index needs {needed}; it is truncated", "copy or make it again"
        )
