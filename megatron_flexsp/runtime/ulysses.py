"""Ulysses attention: trade a slice of all heads for all tokens of some heads, attend, trade back.

The exchange is that of DeepSpeed-Ulysses (Jacobs et al., arXiv 2309.14509); slices are contiguous cuts
of a pack, and query, key and value, whatever their widths, travel in one all-to-all. Each way, a tensor is
copied once into the order in which it is sent, or out of the order in which it came; the kernel works on what
was received.

The exchanges can't hide behind compute of their own layer: what comes before one needs all of it done, and so
does what comes after, forward and backward. (Megatron has computed the weights' gradients of the output
projection by the time that the backward reaches the first exchange.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_flexsp.runtime.groups import SequenceGroup

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def key_value_heads_needed(key_value_heads: int, degree: int) -> int:
    """The fewest key/value heads, each repeated equally often, that ``degree`` ranks can share evenly.

    With ``query_heads`` a multiple of both, it divides ``query_heads`` too, so that each rank's query
    heads find their own key/value heads on that rank.
    """
    return math.lcm(key_value_heads, degree)


def ulysses_attention(q_tHD: Tensor, k_tGD: Tensor, v_tGE: Tensor, group: SequenceGroup, kernel: Kernel) -> Tensor:
    """Attention over a pack whose slices lie on the ranks of ``group``.

    Parameters
    ----------
    q_tHD, k_tGD, v_tGE
        This rank's slice. H must be a multiple of the ranks in a block of the group, and of G. The width E of values
        may be another than that of queries and keys, as in multi-latent attention.
    kernel
        Maps ``q_ThD, k_TgD, v_TgE`` to ``out_ThE``. T are the tokens of the whole pack; where the group is a
        ring, those of this rank's block, and the kernel is ring attention.

    Returns
    -------
    Tensor
        ``out_tHE``, this rank's slice of the result.
    """
    if group.block_size == 1:
        return kernel(q_tHD, k_tGD, v_tGE)
    out_ThE = kernel(*_HeadsOverRanks.apply(group, q_tHD, k_tGD, v_tGE))
    return _TokensOverRanks.apply(group, out_ThE)  # type: ignore[no-any-return]


def at_one_width(kernel: Kernel) -> Kernel:
    """A kernel that wants queries, keys and values of one width, made to take any.

    Zeros beside queries and keys add nothing to a score, and those beside values make columns of zeros.
    """

    def widened(q_ThD: Tensor, k_TgD: Tensor, v_TgE: Tensor) -> Tensor:
        widths = q_ThD.shape[-1], v_TgE.shape[-1]
        if widths[0] == widths[1]:
            return kernel(q_ThD, k_TgD, v_TgE)
        q, k, v = (
            x if x.shape[-1] == max(widths) else F.pad(x, (0, max(widths) - x.shape[-1])) for x in (q_ThD, k_TgD, v_TgE)
        )
        return kernel(q, k, v)[..., : widths[1]]

    return widened


class _HeadsOverRanks(torch.autograd.Function):
    """From a slice of all heads to all tokens of this rank's heads."""

    @staticmethod
    def forward(
        ctx: Any, group: SequenceGroup, q_tHD: Tensor, k_tGD: Tensor, v_tGE: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ranks = group.block_size
        tokens, query_heads, width = q_tHD.shape
        h, g = query_heads // ranks, key_value_heads_needed(k_tGD.shape[1], ranks) // ranks
        ctx.group, ctx.total_heads = group, (query_heads, k_tGD.shape[1], k_tGD.shape[1])
        ctx.shapes = ((h, width), (g, width), (g, v_tGE.shape[2]))
        # Heads of one tensor lie side by side, so that tensors of any widths travel together.
        columns = [heads * width for heads, width in ctx.shapes]
        outgoing = q_tHD.new_empty(ranks, tokens, sum(columns))
        for part, shape, x in zip(outgoing.split(columns, dim=2), ctx.shapes, (q_tHD, k_tGD, v_tGE), strict=True):
            _deal_heads(x, part.unflatten(2, shape))
        incoming = group.exchange_in_block(outgoing).flatten(0, 1).split(columns, dim=1)
        q_ThD, k_TgD, v_TgE = (part.unflatten(1, shape) for part, shape in zip(incoming, ctx.shapes, strict=True))
        return q_ThD, k_TgD, v_TgE

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        outgoing = torch.cat([x.flatten(1) for x in gradients], dim=1).unflatten(0, (ctx.group.block_size, -1))
        columns = [heads * width for heads, width in ctx.shapes]
        incoming = ctx.group.exchange_in_block(outgoing).split(columns, dim=2)
        return None, *(
            _gather_heads(part.unflatten(2, shape), heads)
            for part, shape, heads in zip(incoming, ctx.shapes, ctx.total_heads, strict=True)
        )  # type: ignore[return-value]


class _TokensOverRanks(torch.autograd.Function):
    """From all tokens of this rank's heads to a slice of all heads."""

    @staticmethod
    def forward(ctx: Any, group: SequenceGroup, out_ThE: Tensor) -> Tensor:
        ctx.group = group
        incoming = group.exchange_in_block(out_ThE.unflatten(0, (group.block_size, -1)))
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
