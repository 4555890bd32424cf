"""What multi-token prediction asks of a slice: the tokens, labels and masks that come next in each token's sequence.

Megatron rolls them by one for each depth. Where a slice or a sequence ends, a roll needs what other ranks have, or
nothing at all. Here they are read with the slice, up to the depths that are predicted, so that a roll is answered
without communication.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_flexsp.megatron.sequences import Stretch
from megatron_flexsp.runtime import PackLayout

Learned = Callable[[int, int], NDArray[np.bool_] | None]
"""Which labels of a sequence of the pack count, by its place there and its length; None: all of them."""


@dataclass(frozen=True)
class FurtherTokens:
    """Of every local token, what stands d places further in its sequence, d from 1 on; zero where nothing does.

    All are ``[depths, t]``.
    """

    tokens: Tensor
    positions: Tensor
    labels: Tensor
    weights: Tensor
    """fp32. What a loss counts for in Megatron's log: nothing where no label is or none is to be learned."""
    factors: Tensor
    """fp32. What a weighted loss is multiplied by for the backward pass."""

    def map(self, function: Callable[[Tensor], Tensor]) -> FurtherTokens:
        """The same with a function applied to every tensor."""
        return FurtherTokens(**{item.name: function(getattr(self, item.name)) for item in fields(self)})


class FurtherTokensBuilder:
    """Fills in one slice, piece by piece.

    Summed over the sequence, the losses of a depth weigh as much as those of the next token do: Megatron multiplies
    their sum by the sequence's labels and divides it by those that are left at that depth. So it does to a sequence
    that is a micro-batch by itself, and here to every one, whatever pack it is in.

    Parameters
    ----------
    layout
        The pack as its rank sees it.
    depths
        How many tokens beyond the next one are predicted.
    learned
        Which labels count.
    mean_share
        None where Megatron logs the mean over all tokens. Elsewhere it logs the mean of the micro-batches' means, which
        here becomes that of the sequences' means: each is multiplied by this share, since Megatron divides their sum by
        its own number of micro-batches, which is that of samples.
    """

    def __init__(self, layout: PackLayout, depths: int, learned: Learned, mean_share: float | None) -> None:
        shape = (depths, layout.slice_tokens)
        self._layout, self._depths, self._learned, self._mean_share = layout, depths, learned, mean_share
        self._tokens, self._positions, self._labels = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        self._masks, self._weights, self._factors = (np.zeros(shape, dtype=np.float32) for _ in range(3))

    def add(self, offset: int, sequence: int, start: int, stop: int, ahead: Stretch) -> None:
        """The tokens ``[start, stop)`` of a sequence, which stand in the slice from ``offset`` on.

        ``ahead`` begins at ``start`` and reaches as far beyond ``stop`` as depths are predicted, or to the sequence's
        end.
        """
        length = self._layout.lengths[sequence]
        labels = self._labels_at(sequence)
        for depth in range(1, self._depths + 1):
            count = min(stop, length - depth) - start
            if count <= 0:
                break
            row, here = depth - 1, slice(offset, offset + count)
            self._tokens[row, here] = ahead.tokens[depth : depth + count]
            self._labels[row, here] = ahead.labels[depth : depth + count]
            self._positions[row, here] = np.arange(start + depth, start + depth + count)
            mask = self._masks[row, here]
            mask[:] = 1.0 if ahead.learned is None else ahead.learned[depth : depth + count]
            left = max(labels[depth], 1)
            if self._mean_share is None:
                self._weights[row, here], self._factors[row, here] = mask, labels[0] / left
            else:
                self._weights[row, here] = mask / left * self._mean_share
                self._factors[row, here] = labels[0] / self._mean_share

    def _labels_at(self, sequence: int) -> list[int]:
        """How many labels a whole sequence has, and how many are left at each depth."""
        length = self._layout.lengths[sequence]
        learned = self._learned(sequence, length)
        if learned is None:
            return [max(length - depth, 0) for depth in range(self._depths + 1)]
        return [int(learned[depth:].sum()) for depth in range(self._depths + 1)]

    def build(self) -> FurtherTokens:
        """What was added; the rest of the slice is padding."""
        factors = self._factors
        if self._mean_share is None:
            # There Megatron divides by the weights that it is given.
            factors = factors * np.maximum(self._masks.sum(axis=1, keepdims=True), 1, dtype=np.float32)
        arrays = (self._tokens, self._positions, self._labels, self._weights, factors)
        return FurtherTokens(*map(torch.from_numpy, arrays))
