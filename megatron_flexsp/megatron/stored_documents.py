"""Documents in Megatron's files: how long each is, and any stretch of its tokens."""

from __future__ import annotations

import os
import struct
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from megatron.core.datasets.object_storage_utils import ObjectStorageConfig, is_object_storage_path
from numpy.typing import NDArray

from megatron_flexsp.errors import FlexSPError

Lengths = NDArray[np.int64]

# An index: magic, version, type of a token, how many sequences, how many documents and one; then each
# sequence's length, each one's place in the .bin, and each document's first sequence.
_INDEX_MAGIC = b"MMIDIDX"
_INDEX_HEADER = struct.Struct("<9sQBQQ")
_LENGTH, _POINTER = struct.Struct("<i"), struct.Struct("<q")


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

    def learned(self, document: int, start: int, count: int) -> NDArray[np.bool_] | None:
        """Which of those tokens count as labels; None: all of them."""
        return None


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
