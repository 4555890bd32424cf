"""The textbook: causal softmax attention over a whole pack at once, sequences kept apart by a mask."""

from collections.abc import Sequence

import torch
from torch import Tensor


def dense_attention(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, segment_lengths: Sequence[int], softmax_scale: float
) -> Tensor:
    repeats = q_THD.shape[1] // k_TGD.shape[1]
    k_THD, v_THD = (x.repeat_interleave(repeats, dim=1) for x in (k_TGD, v_TGD))
    segment = torch.repeat_interleave(torch.arange(len(segment_lengths)), torch.tensor(segment_lengths))
    visible_TT = (segment[:, None] == segment[None, :]).tril()
    scores_HTT = torch.einsum("qhd,khd->hqk", q_THD, k_THD) * softmax_scale
    weights_HTT = scores_HTT.masked_fill(~visible_TT, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights_HTT, v_THD)
