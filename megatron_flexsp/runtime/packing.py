"""How the sequences of one micro-batch lie in memory: concatenated, padded once, cut into equal slices.

Lengths and a degree come in; slice bounds, positions and segment boundaries come out. Everything here
stays on the host, so that no layer ever waits for the device to learn a length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_flexsp.planner import slice_tokens


@dataclass(frozen=True)
class Piece:
    """The tokens ``[start, stop)`` of one sequence that lie on one rank."""

    sequence: int
    """The sequence's place in the pack."""

    start: int
    stop: int


@dataclass(frozen=True)
class PackLayout:
    """The layout of one pack, as one of its ranks sees it."""

    lengths: tuple[int, ...]
    """Tokens of each sequence, in pack order. None at all makes a filler: one slice of padding."""

    degree: int
    """Ranks that share the pack."""

    member: int
    """Which of these ranks this one is, 0 to degree - 1."""

    slice_multiple: int = 1
    """What a slice must divide by: the tensor-parallel size under sequence parallelism, else 1."""

    @property
    def total_tokens(self) -> int:
        """Tokens of all sequences, padding not counted."""
        return sum(self.lengths)

    @cached_property
    def slice_tokens(self) -> int:
        """Tokens of each rank's slice, padding counted. At least one, so that no tensor is empty."""
        return slice_tokens(max(self.total_tokens, 1), self.degree, self.slice_multiple)

    @property
    def padded_tokens(self) -> int:
        """Tokens of the whole pack, padding counted."""
        return self.slice_tokens * self.degree

    @cached_property
    def segment_lengths(self) -> tuple[int, ...]:
        """Tokens of each stretch that attends only to itself: the sequences, then the padding if any."""
        padding = self.padded_tokens - self.total_tokens
        return (*self.lengths, padding) if padding else self.lengths

    @cached_property
    def cu_seqlens(self) -> np.ndarray:
        """Where in the pack each segment begins and the last one ends, int32 ``[segments + 1]``."""
        return np.cumsum((0, *self.segment_lengths), dtype=np.int32)

    @cached_property
    def longest_segment(self) -> int:
        """Tokens of the longest segment."""
        return max(self.segment_lengths)

    @property
    def slice_start(self) -> int:
        """Where this rank's slice begins in the pack."""
        return self.member * self.slice_tokens

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """What this rank's slice holds, in order. What is missing to ``slice_tokens`` is padding."""
        ends = np.cumsum(np.asarray(self.lengths, dtype=np.int64))
        begins = ends - np.asarray(self.lengths, dtype=np.int64)
        start, stop = self.slice_start, self.slice_start + self.slice_tokens
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(begins, stop, side="left"))
        return tuple(
            Piece(
                sequence=k,
                start=max(start - int(begins[k]), 0),
                stop=min(stop - int(begins[k]), self.lengths[k]),
            )
            for k in range(first, last)
        )

    @cached_property
    def positions(self) -> np.ndarray:
        """Each local token's position in its own sequence, int64 ``[slice_tokens]``; 0 for padding."""
        positions = np.zeros(self.slice_tokens, dtype=np.int64)
        offset = 0
        for piece in self.pieces:
            count = piece.stop - piece.start
            positions[offset : offset + count] = np.arange(piece.start, piece.stop)
            offset += count
        return positions
