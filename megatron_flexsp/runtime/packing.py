"""How the sequences of one micro-batch lie in memory: concatenated, padded once, cut into equal slices.

Lengths and a degree come in; slice bounds, positions and segment boundaries come out. Everything here
stays on the host, so that no layer ever waits for the device to learn a length.

A group that has more ranks than there are query heads is a ring of blocks of ranks. The pack is then dealt to
the blocks first, so that each has the same part of the attention's work, and each block's part is cut into slices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_flexsp.planner import slice_tokens


def ring_size_of(degree: int, query_heads: int) -> int:
    """Blocks of ranks in a group's ring: as few as there can be, where a block's ranks share the query heads evenly.

    >>> [ring_size_of(degree, query_heads=8) for degree in (1, 8, 16, 12)]
    [1, 1, 2, 3]
    """
    return degree // math.gcd(degree, query_heads)


@dataclass(frozen=True)
class Piece:
    """The tokens ``[start, stop)`` of one sequence that lie on one rank."""

    sequence: int
    """The sequence's place in the pack."""

    start: int
    stop: int


@dataclass(frozen=True)
class RingShares:
    """What each block of a ring has of each sequence: two stretches, an early and a late one.

    A sequence is ``early_0 .. early_R-1, late_R-1 .. late_0`` (the zigzag that is usual for causal ring
    attention), so that the blocks have the same work whatever its length. Lengths need not divide: token c
    of the pack counts for block c mod R, which gives every block its part of every sequence and of the pack
    to within one token.
    """

    early_tokens: NDArray[np.int64]
    """``[ring_size, sequences]``"""

    late_tokens: NDArray[np.int64]
    """``[ring_size, sequences]``"""

    @classmethod
    def of(cls, lengths: tuple[int, ...], ring_size: int) -> RingShares:
        """Deal sequences of these lengths to so many blocks."""
        bounds = np.cumsum(np.array([0, *lengths], dtype=np.int64))
        blocks = np.arange(ring_size)[:, None]
        tokens = np.diff((bounds + ring_size - 1 - blocks) // ring_size, axis=1)
        late = tokens // 2
        return cls(early_tokens=tokens - late, late_tokens=late)

    @cached_property
    def tokens(self) -> NDArray[np.int64]:
        """Tokens that each block has of each sequence, ``[ring_size, sequences]``."""
        return self.early_tokens + self.late_tokens

    def early_start(self, block: int) -> NDArray[np.int64]:
        """Where a block's early stretch begins in each sequence."""
        return np.asarray(self.early_tokens[:block].sum(axis=0))

    def late_start(self, block: int) -> NDArray[np.int64]:
        """Where a block's late stretch begins in each sequence."""
        return np.asarray(self.early_tokens.sum(axis=0) + self.late_tokens[block + 1 :].sum(axis=0))


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

    ring_size: int = 1
    """Blocks of neighbouring ranks that the group's ring has; it divides the degree."""

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
        """Where in the pack each segment begins and the last one ends, int32 ``[n + 1]``, n a power of two.

        Empty segments fill it up: a kernel that is prepared for each number of segments, as cuDNN 9.24's is under
        Transformer Engine 2.18 and newer, then meets few of them. Kernels for packs take empty segments; Megatron
        fills up its own packs with them for CUDA graphs.
        """
        segments = len(self.segment_lengths)
        bounds = np.full((1 << (segments - 1).bit_length()) + 1, self.padded_tokens, dtype=np.int32)
        bounds[: segments + 1] = np.cumsum((0, *self.segment_lengths))
        return bounds

    @cached_property
    def longest_segment(self) -> int:
        """Tokens of the longest segment."""
        return max(self.segment_lengths)

    @property
    def block_size(self) -> int:
        """Ranks in one block of the ring; without a ring, in the group."""
        return self.degree // self.ring_size

    @property
    def block(self) -> int:
        """This rank's block in the ring."""
        return self.member // self.block_size

    @property
    def block_tokens(self) -> int:
        """Tokens of one block's part of the pack, padding counted."""
        return self.slice_tokens * self.block_size

    @cached_property
    def shares(self) -> RingShares:
        """How the sequences are dealt to the ring's blocks."""
        return RingShares.of(self.lengths, self.ring_size)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """What this rank's slice holds, in order. What is missing to ``slice_tokens`` is padding.

        A block has its stretches of each sequence side by side, and a slice is a contiguous cut of that.
        """
        if self.ring_size == 1:
            sequences = np.arange(len(self.lengths))
            starts, tokens = np.zeros_like(sequences), np.asarray(self.lengths, dtype=np.int64)
        else:
            shares, block = self.shares, self.block
            sequences = np.arange(len(self.lengths)).repeat(2)
            starts = np.stack((shares.early_start(block), shares.late_start(block)), axis=1).ravel()
            tokens = np.stack((shares.early_tokens[block], shares.late_tokens[block]), axis=1).ravel()
        ends = np.cumsum(tokens)
        begins = ends - tokens
        start = self.member % self.block_size * self.slice_tokens
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(begins, start + self.slice_tokens, side="left"))
        cut_starts = starts + np.maximum(start - begins, 0)
        cut_stops = starts + np.minimum(start + self.slice_tokens - begins, tokens)
        return tuple(
            Piece(int(sequences[k]), int(cut_starts[k]), int(cut_stops[k])) for k in range(first, last) if tokens[k]
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
