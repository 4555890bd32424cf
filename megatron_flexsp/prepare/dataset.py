"""Documents to the two files of a Megatron data set: ``PREFIX.bin`` (tokens) and ``PREFIX.idx`` (index).

Megatron's own builder writes them under temporary names, then they are renamed: the two files are there and
whole, or they are not there. Memory holds one document, and the index, which the builder keeps to the end.
"""

import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.prepare.sources import Record

END_OF_DOCUMENT = 256
"""Follows the last byte of every document; the bytes themselves are the tokens 0 to 255."""

MEGATRON_TOKENIZER_ARGUMENTS = ("--tokenizer-type", "NullTokenizer", "--vocab-size", str(END_OF_DOCUMENT + 1))
"""What makes Megatron read these tokens: its NullTokenizer takes the last id for the end of a document."""


@dataclass(frozen=True)
class DatasetSummary:
    """What was written."""

    document_tokens: NDArray[np.int32]
    """[documents] tokens of each document in the data set's order, end-of-document token counted."""
    skipped_documents: int
    """Documents without text, which were left out."""

    @property
    def documents(self) -> int:
        return len(self.document_tokens)

    @property
    def tokens(self) -> int:
        return int(self.document_tokens.sum(dtype=np.int64))


def write_dataset(
    records: Iterable[Record],
    output_prefix: Path,
    on_progress: Callable[[int], object] = lambda bytes_read: None,
) -> DatasetSummary:
    """Write ``output_prefix``.bin and .idx.

    Parameters
    ----------
    records
        The documents; consumed once, one at a time.
    output_prefix
        The data set's path without ``.bin`` and ``.idx``, as ``--data-path`` takes it. Its folder is made.
    on_progress
        Is called after each record with the bytes of the source that it took.

    Raises
    ------
    FlexSPError
        If one of the files exists already, can't be written, or no record has text.
    """
    bin_path, idx_path = Path(f"{output_prefix}.bin"), Path(f"{output_prefix}.idx")
    for path in (bin_path, idx_path):
        if path.exists():
            raise FlexSPError(f"{path} exists: delete it or choose another --output-prefix")
    builder_class = _indexed_dataset_builder()
    try:
        bin_path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=bin_path.parent, prefix=f".{bin_path.stem}-") as temporary:
            temporary_bin, temporary_idx = Path(temporary, "bin"), Path(temporary, "idx")
            builder = builder_class(str(temporary_bin), dtype=np.uint16)
            try:
                skipped = _add_documents(records, builder, on_progress)
            except BaseException:
                builder.data_file.close()
                raise
            builder.finalize(str(temporary_idx))
            if not builder.sequence_lengths:
                raise FlexSPError(f"no document has text ({skipped} are empty): nothing to write")
            _rename_both(temporary_bin, bin_path, temporary_idx, idx_path)
    except OSError as error:
        raise FlexSPError(f"cannot write {bin_path} and {idx_path}: {error.strerror}") from error
    return DatasetSummary(np.array(builder.sequence_lengths, dtype=np.int32), skipped)


def _add_documents(records: Iterable[Record], builder: Any, on_progress: Callable[[int], object]) -> int:
    """Give every document with text to the builder; return how many had none."""
    skipped = 0
    for record in records:
        if record.text:
            tokens = np.empty(len(record.text) + 1, dtype=np.uint16)
            tokens[:-1] = np.frombuffer(record.text, dtype=np.uint8)
            tokens[-1] = END_OF_DOCUMENT
            builder.add_document(tokens, [len(tokens)])
        else:
            skipped += 1
        on_progress(record.bytes_read)
    return skipped


def _rename_both(temporary_bin: Path, bin_path: Path, temporary_idx: Path, idx_path: Path) -> None:
    try:
        os.rename(temporary_bin, bin_path)
        os.rename(temporary_idx, idx_path)
    except BaseException:
        bin_path.unlink(missing_ok=True)
        idx_path.unlink(missing_ok=True)
        raise


def _indexed_dataset_builder() -> Any:
    try:
        with warnings.catch_warnings():
            # Megatron warns of each missing GPU library, none of which matters here.
            warnings.simplefilter("ignore")
            from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    except ModuleNotFoundError as error:
        raise FlexSPError(
            f"writing a data set needs Megatron-LM ({error}): pip install 'megatron-flexsp[train]'"
        ) from error
    return IndexedDatasetBuilder
