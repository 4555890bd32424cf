"""Ulysses attention: trade a slice of all heads for all tokens of some heads, attend, trade back.

The exchange is that of DeepSpeed-Ulysses (Jacobs et al., arXiv 2309.14509); slices are contiguous cuts
of a pack, and query, key and value, whatever their widths, travel in one all-to-all. Each way, a tensor is
copied once into the order in which it is sent, or out of the order in which it came; the kernel works on what
was received.

In one part, the exchanges hide behind nothing: what comes before one needs all of it done, and so does what comes
after. In several parts, each with some of the heads, the exchange of one part runs while another attends, forward
and backward; what stays bare is the first part's way there and the last one's way back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_flexsp.runtime.exchange import Exchange
from megatron_flexsp.runtime.groups import SequenceGroup

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def key_value_heads_needed(key_value_heads: int, degree: int) -> int:
    """The fewest key/value heads, each repeated equally often, that ``degree`` ranks can share evenly.

    With ``query_heads`` a multiple of both, it divides ``query_heads`` too, so that each rank's query
    heads find their own key/value heads on that rank.
    """
    return math.lcm(key_value_heads, degree)


def ulysses_attention(
    q_tHD: Tensor, k_tGD: Tensor, v_tGE: Tensor, group: SequenceGroup, kernel: Kernel, parts: int = 1
) -> Tensor:
    """Attention over a pack whose slices lie on the ranks of ``group``.

    Parameters
    ----------
    q_tHD, k_tGD, v_tGE
        This rank's slice. H must be a multiple of the ranks in a block of the group, and of G. The width E of values
        may be another than that of queries and keys, as in multi-latent attention.
    kernel
        Maps ``q_ThD, k_TgD, v_TgE`` to ``out_ThE``. T are the tokens of the whole pack; where the group is a
        ring, those of this rank's block, and the kernel is ring attention. It is called for each part, by its heads.
    parts
        In how many parts to exchange at most; fewer where the heads of a rank don't divide by it.

    Returns
    -------
    Tensor
        ``out_tHE``, this rank's slice of the result.
    """
    ranks = group.block_size
    if ranks == 1:
        return kernel(q_tHD, k_tGD, v_tGE)
    h, g = q_tHD.shape[1] // ranks, key_value_heads_needed(k_tGD.shape[1], ranks) // ranks
    parts = next(
        count for count in range(min(parts, h), 0, -1) if h % count == 0 and (g % count == 0 or count % g == 0)
    )
    # Key/value heads that parts share, or that are sent to several ranks, travel with the first part.
    apart = g % parts == 0 and ranks * g == k_tGD.shape[1]
    q_parts = _split_heads(q_tHD, ranks, parts)
    k_parts, v_parts = (_split_heads(x, ranks, parts) if apart else [x] for x in (k_tGD, v_tGE))
    heads = (h // parts, g // len(k_parts), g // len(k_parts))

    on_the_way = [
        _HeadsOnTheWay(group, heads, [x for x in tensors if x is not None], aside=parts > 1)
        for tensors in zip_longest(q_parts, k_parts, v_parts)
    ]
    keys: list[Tensor] = []
    values: list[Tensor] = []
    on_the_way_back = []
    for part, sent in enumerate(on_the_way):
        q_ThD, *key_value = sent.received()
        for x_TgD, chunks in zip(key_value, (keys, values), strict=False):
            chunks += [x_TgD] if apart else x_TgD.split(max(1, g // parts), dim=1)
        chunk = part if apart else part * len(keys) // parts
        out_ThE = kernel(q_ThD, keys[chunk], values[chunk])
        on_the_way_back.append(Exchange(group, out_ThE.unflatten(0, (ranks, -1)), aside=parts > 1))
    out_parts = [exchange.received().transpose(0, 1) for exchange in on_the_way_back]
    out_tUhE = out_parts[0] if parts == 1 else torch.cat(out_parts, dim=2)
    return out_tUhE.flatten(1, 2)


def _split_heads(x_tND: Tensor, ranks: int, parts: int) -> list[Tensor]:
    """Some heads of every rank for each part, ``[t, ranks, n, D]``; in one part the tensor as it is."""
    if parts == 1:
        return [x_tND]
    x_tUnD = x_tND.unflatten(1, (ranks, -1))
    return list(x_tUnD.split(x_tUnD.shape[2] // parts, dim=2))


class _HeadsOnTheWay:
    """Tensors from slices of all heads to all tokens of some heads, in one exchange.

    ``heads`` are those of a rank, for each tensor.
    """

    def __init__(self, group: SequenceGroup, heads: Sequence[int], tensors: list[Tensor], aside: bool) -> None:
        self._shapes = [(count, x.shape[-1]) for count, x in zip(heads, tensors, strict=False)]
        self._exchange = Exchange(group, _DealtHeads.apply(group.block_size, self._shapes, *tensors), aside)

    def received(self) -> list[Tensor]:
        """Each tensor as ``[T, n, D]``."""
        columns = [heads * width for heads, width in self._shapes]
        incoming = self._exchange.received().flatten(0, 1).split(columns, dim=1)
        return [x.unflatten(1, shape) for x, shape in zip(incoming, self._shapes, strict=True)]


class _DealtHeads(torch.autograd.Function):
    """What to send to each rank: its heads of all tensors, ``[ranks, t, columns]``.

    Heads of one tensor lie side by side, so that tensors of any widths travel together.
    """

    @staticmethod
    def forward(ctx: Any, ranks: int, shapes: list[tuple[int, int]], *tensors: Tensor) -> Tensor:
        ctx.shapes, ctx.totals = shapes, [None if x.dim() == 4 else x.shape[1] for x in tensors]
        columns = [heads * width for heads, width in shapes]
        outgoing = tensors[0].new_empty(ranks, tensors[0].shape[0], sum(columns))
        for part, shape, x in zip(outgoing.split(columns, dim=2), shapes, tensors, strict=True):
            _deal_heads(x, part.unflatten(2, shape))
        return outgoing

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, *tuple[Tensor, ...]]:
        parts = gradients[0].split([heads * width for heads, width in ctx.shapes], dim=2)
        return (
            None,
            None,
            *(
                _gather_heads(part.unflatten(2, shape), total)
                for part, shape, total in zip(parts, ctx.shapes, ctx.totals, strict=True)
            ),
        )


def _deal_heads(x: Tensor, part_UtnD: Tensor) -> None:
    """Write each rank's heads, of U ranks; where there are too few, every head goes to equally many.

    ``x`` is ``[t, N, D]``, or ``[t, U, n, D]`` where a part of them is chosen already.
    """
    if x.dim() == 4:
        part_UtnD.copy_(x.transpose(0, 1))
        return
    ranks, heads = part_UtnD.shape[0], part_UtnD.shape[2]
    repeats = ranks * heads // x.shape[1]
    if repeats > 1 and heads == 1:
        part_UtnD.squeeze(2).unflatten(0, (-1, repeats)).copy_(x.transpose(0, 1).unsqueeze(1))
        return
    if repeats > 1:
        x = x.repeat_interleave(repeats, dim=1)
    part_UtnD.copy_(x.unflatten(1, (ranks, heads)).transpose(0, 1))


def _gather_heads(part_UtnD: Tensor, total_heads: int | None) -> Tensor:
    """The backward of ``_deal_heads``: ``[t, N, D]``, summed over the copies of each head; None: ``[t, U, n, D]``."""
    if total_heads is None:
        return part_UtnD.transpose(0, 1)
    ranks, _, heads, _ = part_UtnD.shape
    repeats = ranks * heads // total_heads
    if repeats > 1 and heads == 1:
        return part_UtnD.squeeze(2).unflatten(0, (-1, repeats)).sum(1).transpose(0, 1)
    x_tLD = part_UtnD.transpose(0, 1).flatten(1, 2)
    return x_tLD if repeats == 1 else x_tLD.unflatten(1, (-1, repeats)).sum(2)


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
