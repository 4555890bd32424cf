"""Ulysses attention: trade a slice of all heads for all tokens of some heads, attend, trade back.

The exchange is that of DeepSpeed-Ulysses (Jacobs et al., arXiv 2309.14509); slices are contiguous cuts
of a pack, and query, key and value travel in one all-to-all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_flexsp.runtime.groups import SequenceGroup

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


class _AllToAll(torch.autograd.Function):
    """Row block i of the input goes to member i; its backward is the same exchange."""

    @staticmethod
    def forward(ctx: Any, process_group: dist.ProcessGroup, outgoing: Tensor) -> Tensor:
        ctx.process_group = process_group
        return _exchange(process_group, outgoing)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, _exchange(ctx.process_group, gradients[0])


def _exchange(process_group: dist.ProcessGroup, outgoing: Tensor) -> Tensor:
    # Both buffers must be dense in memory order. empty_like() of a transposed view would keep the
    # view's strides, and the collective, which sees bare memory, would deliver scrambled rows.
    outgoing = outgoing.contiguous()
    incoming = torch.empty(outgoing.shape, dtype=outgoing.dtype, device=outgoing.device)
    dist.all_to_all_single(incoming, outgoing, group=process_group)
    return incoming


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
        This rank's slice. H must be a multiple of the group's degree and of G.
    kernel
        Maps whole-pack ``q_ThD, k_TgD, v_TgD`` to ``out_ThD``.

    Returns
    -------
    Tensor
        ``out_tHD``, this rank's slice of the result.
    """
    if group.process_group is None:
        return kernel(q_tHD, k_tGD, v_tGD)
    degree = group.degree
    slice_tokens, query_heads, width = q_tHD.shape
    heads = query_heads // degree
    repeats = key_value_heads_needed(k_tGD.shape[1], degree) // k_tGD.shape[1]
    if repeats > 1:
        k_tGD = k_tGD.repeat_interleave(repeats, dim=1)
        v_tGD = v_tGD.repeat_interleave(repeats, dim=1)
    key_value_heads = k_tGD.shape[1] // degree

    by_member = [x.unflatten(1, (degree, -1)) for x in (q_tHD, k_tGD, v_tGD)]
    outgoing = torch.cat(by_member, dim=2).transpose(0, 1)
    incoming = _AllToAll.apply(group.process_group, outgoing)
    whole_pack = incoming.flatten(0, 1).split((heads, key_value_heads, key_value_heads), dim=1)
    out_ThD = kernel(*whole_pack)

    outgoing = out_ThD.reshape(degree, slice_tokens, heads, width)
    incoming = _AllToAll.apply(group.process_group, outgoing)
    return incoming.transpose(0, 1).reshape(slice_tokens, query_heads, width)
