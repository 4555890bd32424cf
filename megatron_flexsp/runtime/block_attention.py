"""Attention of some queries over some keys, with what it takes to put parts together: the kernels of the ring.

The forward gives the log-sum-exp of the scores beside its result; the backward takes those of the whole, so
that each part's gradients are its share of the whole's. Scores are never whole in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_flexsp.errors import FlexSPError

_WIDEST_HEAD = 256


@dataclass(frozen=True)
class Segments:
    """Stretches of the queries, and the stretch of the keys that each of them attends to."""

    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    q_bounds: Tensor
    """Where the stretches begin and end, int32 ``[segments + 1]``, on the device."""
    k_bounds: Tensor

    @cached_property
    def is_empty(self) -> bool:
        """Whether no query sees a key."""
        return not any(map(min, self.q_lengths, self.k_lengths))

    @cached_property
    def has_keyless(self) -> bool:
        """Whether some stretch of queries has no keys at all."""
        return 0 in self.k_lengths

    @cached_property
    def longest_q(self) -> int:
        """What a GPU's kernel is told of the longest stretch of queries: its tokens, but 2 at least.

        At 1 the kernel takes for granted that every stretch has one query, and none of them none.
        """
        return max(2, *self.q_lengths)

    @cached_property
    def longest_k(self) -> int:
        """Tokens of the longest stretch of keys."""
        return max(self.k_lengths)


def check_block_attention(device: torch.device, dtype: torch.dtype, head_width: int) -> None:
    """Try the kernels once.

    Raises
    ------
    FlexSPError
        Where this device, this PyTorch or this head width has none.
    """
    if device.type == "cpu":
        return
    obstacle = gpu_obstacle(dtype, head_width)
    if obstacle is None:
        bounds = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
        segments = Segments((3, 5), (3, 5), bounds, bounds)
        q, k, v = torch.zeros(3, 8, 2, head_width, dtype=dtype, device=device)
        try:
            out, lse = block_attention(q, k[:, :1], v[:, :1], segments, causal=True, softmax_scale=1.0)
            block_attention_backward(out, q, k[:, :1], v[:, :1], out, lse, segments, causal=True, softmax_scale=1.0)
        except (RuntimeError, TypeError, AttributeError) as error:
            obstacle = f"PyTorch {torch.__version__} has no flash attention for this device ({error})"
        else:
            if lse.shape != (2, 8):
                obstacle = f"PyTorch {torch.__version__} is too old; 2.6 is the first whose flash attention serves"
    if obstacle is not None:
        raise FlexSPError(f"groups of more ranks than attention heads need ring attention: {obstacle}")


def gpu_obstacle(dtype: torch.dtype, head_width: int) -> str | None:
    """Why PyTorch's flash attention on a GPU doesn't take such heads; None if it does."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"on a GPU it works in bf16 and fp16 (--bf16, --fp16), not in {str(dtype).removeprefix('torch.')}"
    if head_width % 8 or head_width > _WIDEST_HEAD:
        return f"on a GPU heads must be a multiple of 8 wide and at most {_WIDEST_HEAD}, not {head_width}"
    return None


def block_attention(
    q_ThD: Tensor, k_SgD: Tensor, v_SgD: Tensor, segments: Segments, *, causal: bool, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attend within each segment.

    Parameters
    ----------
    q_ThD, k_SgD, v_SgD
        T queries and S keys; h is a multiple of g.
    segments
        They add up to T queries and S keys.
    causal
        Whether a query sees only keys up to its own place; segments then have as many keys as queries.
    softmax_scale
        Factor of the scores before the softmax.

    Returns
    -------
    tuple
        ``out_ThD``, and the log-sum-exp of each query's scores, fp32 ``[h, T]``. A query without keys has
        0 and minus infinity.
    """
    q_ThD, k_SgD, v_SgD = (_dense_rows(x) for x in (q_ThD, k_SgD, v_SgD))
    if q_ThD.is_cuda:
        out_ThD, lse_hT, *_ = torch.ops.aten._flash_attention_forward(
            *(q_ThD, k_SgD, v_SgD, segments.q_bounds, segments.k_bounds, segments.longest_q, segments.longest_k),
            *(0.0, causal, False),
            scale=softmax_scale,
        )
        # The kernel says plus infinity where there are no keys.
        return out_ThD, lse_hT.masked_fill_(lse_hT == torch.inf, -torch.inf) if segments.has_keyless else lse_hT
    out_ThD = torch.zeros(q_ThD.shape, dtype=q_ThD.dtype)
    lse_hT = torch.full((q_ThD.shape[1], q_ThD.shape[0]), -torch.inf)
    for q, k in _spans(segments):
        out_1hsD, lse_1hs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_heads_first(x) for x in (q_ThD[q], k_SgD[k], v_SgD[k])), 0.0, causal, scale=softmax_scale
        )
        out_ThD[q] = out_1hsD.squeeze(0).transpose(0, 1)
        lse_hT[:, q] = lse_1hs.squeeze(0)
    return out_ThD, lse_hT


def block_attention_backward(
    dout_ThD: Tensor,
    q_ThD: Tensor,
    k_SgD: Tensor,
    v_SgD: Tensor,
    out_ThD: Tensor,
    lse_hT: Tensor,
    segments: Segments,
    *,
    causal: bool,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values that come through these scores.

    ``out_ThD`` and ``lse_hT`` are those of the queries over all of their keys, of which these may be a part.
    The other arguments are those of ``block_attention``.
    """
    dout_ThD, q_ThD, k_SgD, v_SgD, out_ThD = (_dense_rows(x) for x in (dout_ThD, q_ThD, k_SgD, v_SgD, out_ThD))
    if q_ThD.is_cuda:
        # The kernel reads the log-sum-exp as bare memory. Without dropout it reads no random state.
        no_state = torch.empty(2, dtype=torch.uint64, device=q_ThD.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            *(dout_ThD.contiguous(), q_ThD, k_SgD, v_SgD, out_ThD.contiguous(), lse_hT.contiguous()),
            *(segments.q_bounds, segments.k_bounds, segments.longest_q, segments.longest_k),
            *(0.0, causal, no_state, no_state),
            scale=softmax_scale,
        )
        return dq, dk, dv
    gradients = tuple(torch.zeros(x.shape, dtype=x.dtype) for x in (q_ThD, k_SgD, v_SgD))
    for q, k in _spans(segments):
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_heads_first(x) for x in (dout_ThD[q], q_ThD[q], k_SgD[k], v_SgD[k], out_ThD[q])),
            *(lse_hT[:, q].unsqueeze(0), 0.0, causal),
            scale=softmax_scale,
        )
        for gradient, part, span in zip(gradients, parts, (q, k, k), strict=True):
            gradient[span] = part.squeeze(0).transpose(0, 1)
    return gradients[0], gradients[1], gradients[2]


def _spans(segments: Segments) -> Iterator[tuple[slice, slice]]:
    """Where the queries and the keys of each segment are that has both."""
    q_start = k_start = 0
    for q_tokens, k_tokens in zip(segments.q_lengths, segments.k_lengths, strict=True):
        if q_tokens and k_tokens:
            yield slice(q_start, q_start + q_tokens), slice(k_start, k_start + k_tokens)
        q_start, k_start = q_start + q_tokens, k_start + k_tokens


def _dense_rows(x: Tensor) -> Tensor:
    """What the kernels, which don't ask, take for granted: the values of a head side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads_first(x_shD: Tensor) -> Tensor:
    return x_shD.transpose(0, 1).unsqueeze(0)
