"""What is read ahead for multi-token prediction, against Megatron's own rolls of whole sequences."""

import numpy as np
import pytest
import torch

from megatron_flexsp.megatron.further_tokens import FurtherTokens, FurtherTokensBuilder
from megatron_flexsp.megatron.sequences import Stretch
from megatron_flexsp.runtime import PackLayout

DEPTHS = 3
LENGTHS = (5, 1, 17, 3, 2)
TEXTS = [np.arange(1, length + 2) + 100 * number for number, length in enumerate(LENGTHS)]
LEARNED = [np.random.default_rng(number).random(len(text)) < 0.6 for number, text in enumerate(TEXTS)]


def read(layout: PackLayout, masked: bool, mean_share: float | None) -> FurtherTokens:
    def learned(sequence: int, length: int) -> np.ndarray | None:
        return LEARNED[sequence][1 : length + 1] if masked else None

    builder = FurtherTokensBuilder(layout, DEPTHS, learned, mean_share)
    offset = 0
    for piece in layout.pieces:
        ahead = min(piece.stop + DEPTHS, LENGTHS[piece.sequence])
        text = TEXTS[piece.sequence][piece.start : ahead + 1]
        mask = learned(piece.sequence, ahead)
        found = Stretch(text[:-1], text[1:], None if mask is None else mask[piece.start :])
        builder.add(offset, piece.sequence, piece.start, piece.stop, found)
        offset += piece.stop - piece.start
    return builder.build()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("degree", "ring_size"), [(1, 1), (4, 1), (4, 2), (7, 1)])
def test_slices_hold_what_whole_sequences_roll_to(degree: int, ring_size: int, masked: bool) -> None:
    from megatron.core.transformer.multi_token_prediction import roll_tensor

    layouts = [PackLayout(LENGTHS, degree, member, 1, ring_size) for member in range(degree)]
    slices = [read(layout, masked, mean_share=0.5) for layout in layouts]
    by_token = [read(layout, masked, mean_share=None) for layout in layouts]
    for sequence, (text, mask) in enumerate(zip(TEXTS, LEARNED, strict=True)):
        rolled = [torch.from_numpy(part)[None] for part in (text[:-1], np.arange(len(text) - 1), text[1:])]
        loss_mask = torch.from_numpy(mask[1:] if masked else np.ones(len(text) - 1))[None].float()
        labels = loss_mask.sum()
        for depth in range(DEPTHS):
            rolled = [roll_tensor(part)[0] for part in rolled]
            loss_mask, left = roll_tensor(loss_mask)
            weights, factors = 0.5 * loss_mask / left.clamp(min=1), loss_mask * labels / left.clamp(min=1)
            for layout, further, other in zip(layouts, slices, by_token, strict=True):
                offset = 0
                for piece in layout.pieces:
                    count = piece.stop - piece.start
                    if piece.sequence == sequence:
                        there, here = slice(piece.start, piece.stop), slice(offset, offset + count)
                        found = (further.tokens, further.positions, further.labels)
                        for mine, whole in zip(found, rolled, strict=True):
                            assert torch.equal(mine[depth, here], whole[0, there])
                        torch.testing.assert_close(further.weights[depth, here], weights[0, there])
                        scaled = further.weights * further.factors
                        torch.testing.assert_close(scaled[depth, here], factors[0, there])
                        # Megatron divides these by the weights of the slice.
                        assert torch.equal(other.weights[depth, here], loss_mask[0, there])
                        share = other.weights[depth] * other.factors[depth] / other.weights[depth].sum().clamp(min=1)
                        torch.testing.assert_close(share[here], factors[0, there])
                    offset += count
                for part in (further.tokens, further.labels, further.weights, other.weights):
                    assert not part[depth, offset:].any()
