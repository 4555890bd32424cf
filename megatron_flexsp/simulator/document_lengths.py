"""How long the documents of a Megatron data set are: its index is read, never its tokens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.indexed_files import HEADER_BYTES, LENGTH_BYTES, MAGIC, POINTER_BYTES, IndexHeader

Lengths = NDArray[np.int64]

_STRETCH = 1024
"""Documents that are read in a row where not all are read."""


def count_documents(prefix: str) -> int:
    """How many documents a Megatron data set has, from the first bytes of its index.

    Raises
    ------
    FlexSPError
        If the index is missing, is none, or is cut off.
    """
    with _opened(prefix) as stream:
        return _read_header(stream, prefix).bounds - 1


def read_document_lengths(prefix: str, at_most: int | None = None) -> Lengths:
    """Tokens that each document of a Megatron data set predicts: all but its first.

    Parameters
    ----------
    prefix
        The data set's path without ``.idx`` and ``.bin``, as ``--data-path`` takes it.
    at_most
        Of a larger data set read only about so many documents, in stretches from all over it.

    Raises
    ------
    FlexSPError
        If the index is missing, is none, or is cut off.
    """
    with _opened(prefix) as stream:
        header = _read_header(stream, prefix)
        needed = header.index_bytes
        if os.fstat(stream.fileno()).st_size < needed:
            raise FlexSPError(f"{prefix}.idx is truncated", "copy or make it again")
        # Mapped, so that a stretch costs no more than itself.
        whole = np.memmap(stream, dtype=np.uint8, mode="r")
    sequence_tokens = whole[HEADER_BYTES : HEADER_BYTES + LENGTH_BYTES * header.sequences].view("<i4")
    first_sequences = whole[needed - POINTER_BYTES * header.bounds : needed].view("<i8")
    count = header.bounds - 1
    if at_most is None or count <= at_most:
        stretches = [(0, count)]
    else:
        starts = np.linspace(0, count - _STRETCH, max(1, at_most // _STRETCH)).astype(np.int64)
        stretches = [(int(start), int(start) + _STRETCH) for start in np.maximum(starts, 0)]
    parts = []
    for start, stop in stretches:
        first = np.asarray(first_sequences[start : min(stop, count) + 1])
        tokens = np.asarray(sequence_tokens[first[0] : first[-1]])
        ends = np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)])
        parts.append(np.diff(ends[first - first[0]]) - 1)
    predicted = np.concatenate(parts)
    return predicted[predicted > 0]


def _opened(prefix: str) -> BinaryIO:
    path = Path(f"{prefix}.idx")
    try:
        return path.open("rb")
    except OSError as error:
        raise FlexSPError(
            f"{path}: cannot read ({error.strerror})", "give the path of the data set without .idx or .bin"
        ) from None


def _read_header(stream: BinaryIO, prefix: str) -> IndexHeader:
    header = stream.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES or not header.startswith(MAGIC):
        raise FlexSPError(f"{prefix}.idx is no Megatron index", "make the data set again")
    return IndexHeader.of(header)
