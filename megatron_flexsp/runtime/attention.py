"""Causal attention over a pack with PyTorch's scaled-dot-product attention, sequence by sequence.

The kernel for machines without Transformer Engine. Whole sequences come in, so every one is an ordinary
causal attention of its own and nothing is masked that need not be.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""All but cuDNN's, which newer versions of PyTorch prefer on Hopper and Blackwell: it is compiled anew for every length
that comes, of which documents have thousands, and what was compiled is kept for ever."""


def packed_causal_attention(
    q_ThD: Tensor,
    k_TgD: Tensor,
    v_TgD: Tensor,
    segment_lengths: Sequence[int],
    softmax_scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Each segment of the pack attends causally to itself.

    Parameters
    ----------
    q_ThD, k_TgD, v_TgD
        The whole pack; h is a multiple of g.
    segment_lengths
        Tokens of each segment; they add up to T.
    softmax_scale
        Factor of the scores before the softmax.
    dropout
        Share of the weights after the softmax that is dropped.

    Returns
    -------
    Tensor
        ``out_ThD``
    """
    grouped = q_ThD.shape[1] != k_TgD.shape[1]
    if grouped and q_ThD.is_cuda and q_ThD.dtype == torch.float32:
        # The one kernel for 32 bits that needs no square of the length takes no grouped heads.
        repeats = q_ThD.shape[1] // k_TgD.shape[1]
        k_TgD, v_TgD = (x.repeat_interleave(repeats, dim=1) for x in (k_TgD, v_TgD))
        grouped = False
    # split(), not slicing: its backward is one concatenation, not a pack-sized tensor of zeros for each.
    segments = zip(*(x.split(tuple(segment_lengths)) for x in (q_ThD, k_TgD, v_TgD)), strict=True)
    outputs = []
    with sdpa_kernel(_KERNELS):
        for segment in segments:
            q_1hsD, k_1gsD, v_1gsD = (x.transpose(0, 1).unsqueeze(0) for x in segment)
            out_1hsD = F.scaled_dot_product_attention(
                q_1hsD, k_1gsD, v_1gsD, dropout_p=dropout, is_causal=True, scale=softmax_scale, enable_gqa=grouped
            )
            outputs.append(out_1hsD.squeeze(0).transpose(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
