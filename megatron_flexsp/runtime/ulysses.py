"""Ulysses attention: trade a slice of all heads for all tokens of some heads, attend, trade back.

The exchange is that of DeepSpeed-Ulysses (Jacobs et al., arXiv 2309.14509); slices are contiguous cuts
of a pack, and query, key and value travel in one all-to-all. Each way, a tensor is copied once into the
order in which it is sent, or out of the order in which it came; the kernel works on what was received.

The exchanges can't hide behind compute of their own layer: what comes before one needs all of it done, and so
does what comes after, forward and backward. (Megatron has computed the weights' gradients of the output
projection by the time that the backward reaches the first exchange.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_flexsp.runtime.groups import SequenceGroup

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def key_value_heads_needed(key_value_heads: int, degree: int) -> int:
    """The fewest key/value heads, each repeated equally often, that ``degree`` ranks can share evenly.

    With ``query_heads`` a multiple of both, it divides ``query_heads`` too, so that each rank's query
    heads find their own key/value heads on that rank.
    """
    return math.lcm(key_value_heads, degree)


def ulysses_attention(q_tHD: Tensor, k_tGD: Tensor, v_tGD: Tensor, group: SequenceGroup, kernel: Kernel) -> Tensor:
    """Attention over a pack whose slices lie on the ranks of ``group``.

    Parameters
    ----------
    q_tHD, k_tGD, v_tGD
        This rank's slice. H must be a multiple of the ranks in a block of the group, and of G.
    kernel
        Maps ``q_ThD, k_TgD, v_TgD`` to ``out_ThD``. T are the tokens of the whole pack; where the group is a
        ring, those of this rank's block, and the kernel is ring attention.

    Returns
    -------
    Tensor
        ``out_tHD``, this rank's slice of the result.
    """
    if group.block_size == 1:
        return kernel(q_tHD, k_tGD, v_tGD)
    out_ThD = kernel(*_HeadsOverRanks.apply(group, q_tHD, k_tGD, v_tGD))
    return _TokensOverRanks.apply(group, out_ThD)  # type: ignore[no-any-return]


class _HeadsOverRanks(torch.autograd.Function):
    """From a slice of all heads to all tokens of this rank's heads."""

    @staticmethod
    def forward(
        ctx: Any, group: SequenceGroup, q_tHD: Tensor, k_tGD: Tensor, v_tGD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ranks = group.block_size
        tokens, query_heads, width = q_tHD.shape
        h, g = query_heads // ranks, key_value_heads_needed(k_tGD.shape[1], ranks) // ranks
        ctx.group, ctx.heads, ctx.key_value_heads = group, (h, g, g), k_tGD.shape[1]
        outgoing = q_tHD.new_empty(ranks, tokens, h + 2 * g, width)
        for part, x in zip(outgoing.split(ctx.heads, dim=2), (q_tHD, k_tGD, v_tGD), strict=True):
            _deal_heads(x, part)
        q_ThD, k_TgD, v_TgD = group.exchange_in_block(outgoing).flatten(0, 1).split(ctx.heads, dim=1)
        return q_ThD, k_TgD, v_TgD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        outgoing = torch.cat(gradients, dim=1).unflatten(0, (ctx.group.block_size, -1))
        dq, dk, dv = ctx.group.exchange_in_block(outgoing).split(ctx.heads, dim=2)
        query_heads = ctx.group.block_size * ctx.heads[0]
        return None, *(
            _gather_heads(x, heads)
            for x, heads in ((dq, query_heads), (dk, ctx.key_value_heads), (dv, ctx.key_value_heads))
        )  # type: ignore[return-value]


class _TokensOverRanks(torch.autograd.Function):
    """From all tokens of this rank's heads to a slice of all heads."""

    @staticmethod
    def forward(ctx: Any, group: SequenceGroup, out_ThD: Tensor) -> Tensor:
        ctx.group = group
        incoming = group.exchange_in_block(out_ThD.unflatten(0, (group.block_size, -1)))
        return incoming.transpose(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        outgoing = gradients[0].unflatten(1, (ctx.group.block_size, -1)).transpose(0, 1)
        return None, ctx.group.exchange_in_block(outgoing).flatten(0, 1)


def _deal_heads(x_tND: Tensor, part_UtnD: Tensor) -> None:
    """Write each rank's heads, of U ranks; where there are too few, every head goes to equally many."""
    ranks, heads = part_UtnD.shape[0], part_UtnD.shape[2]
    repeats = ranks * heads // x_tND.shape[1]
    if repeats > 1 and heads == 1:
        part_UtnD.squeeze(2).unflatten(0, (-1, repeats)).copy_(x_tND.transpose(0, 1).unsqueeze(1))
        return
    if repeats > 1:
        x_tND = x_tND.repeat_interleave(repeats, dim=1)
    part_UtnD.copy_(x_tND.unflatten(1, (ranks, heads)).transpose(0, 1))


def _gather_heads(part_UtnD: Tensor, total_heads: int) -> Tensor:
    """The backward of ``_deal_heads``: ``[t, N, D]``, summed over the copies of each head."""
    ranks, _, heads, _ = part_UtnD.shape
    repeats = ranks * heads // total_heads
    if repeats > 1 and heads == 1:
        return part_UtnD.squeeze(2).unflatten(0, (-1, repeats)).sum(1).transpose(0, 1)
    x_tLD = part_UtnD.transpose(0, 1).flatten(1, 2)
    return x_tLD if repeats == 1 else x_tLD.unflatten(1, (-1, repeats)).sum(2)
