"""Packed and unpacked attention as a dense softmax, sequence by sequence."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

MASKS = ("no_mask", "padding", "causal", "padding_causal")


class DotProductAttention(torch.nn.Module):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
    ) -> None:
        super().__init__()
        assert cp_group is None and attention_type == "self"
        self.cp_group, self.cp_global_ranks = None, None  # Megatron's dev branch reads them
        self.qkv_format, self.attn_mask_type, self.window_size = qkv_format, attn_mask_type, window_size
        self.tp_size = tp_size if tp_group is None else tp_group.size()
        self.num_gqa_groups = num_gqa_groups or num_attention_heads
        assert num_attention_heads % self.num_gqa_groups == 0
        self.num_gqa_groups_per_partition = self.num_gqa_groups // self.tp_size
        widths = (kv_channels, kv_channels) if isinstance(kv_channels, int) else kv_channels
        self.hidden_size_per_attention_head_k, self.hidden_size_per_attention_head_v = widths
        self.flash_attention = SimpleNamespace(softmax_scale=softmax_scale or 1.0 / math.sqrt(widths[0]))
        self.attention_dropout = attention_dropout
        outside = sequence_parallel or get_rng_state_tracker is None
        self.dropout_context = nullcontext if outside else get_rng_state_tracker().fork  # type: ignore[misc]
        self.softmax_type, heads = softmax_type, num_attention_heads // self.tp_size
        if softmax_type == "vanilla":
            self.softmax_offset = None
        elif softmax_type == "off-by-one":
            self.softmax_offset = torch.zeros(heads)
        else:
            self.softmax_offset = torch.nn.Parameter(torch.zeros(heads))

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        pad_between_seqs: bool | None = None,
    ) -> Tensor:
        q, k, v = query_layer, key_layer, value_layer
        assert q.dtype == k.dtype == v.dtype
        assert k.shape[:-1] == v.shape[:-1]
        assert q.shape[-1] == k.shape[-1] == self.hidden_size_per_attention_head_k
        assert v.shape[-1] == self.hidden_size_per_attention_head_v
        assert all(x.stride(-1) == 1 for x in (q, k, v)), "q, k and v must have stride 1 in their last dimension!"
        assert k.shape[-2] == self.num_gqa_groups_per_partition, (
            f"Keys and values must have num_gqa_group = {self.num_gqa_groups_per_partition} heads!"
        )
        attn_mask_type, qkv_format = attn_mask_type or self.attn_mask_type, qkv_format or self.qkv_format
        assert attn_mask_type in MASKS and qkv_format in ("sbhd", "thd")
        causal = "causal" in attn_mask_type
        window = window_size or self.window_size or (-1, -1)
        if qkv_format == "sbhd":
            assert q.dim() == k.dim() == v.dim() == 4
            assert "padding" not in attn_mask_type or attention_mask is not None
            out = torch.stack(
                [self._attend(*(x[:, b] for x in (q, k, v)), causal, window) for b in range(q.shape[1])], 1
            )
            return out.flatten(2)
        assert q.dim() == k.dim() == v.dim() == 3
        assert q.shape[-1] == v.shape[-1], "the kernels for packs of most GPUs take no other widths"
        assert "padding" in attn_mask_type
        assert cu_seqlens_q is not None and cu_seqlens_kv is not None
        assert cu_seqlens_q.shape == cu_seqlens_kv.shape and cu_seqlens_q.dim() == 1
        assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
        # A device would be asked for these, and the host would wait.
        assert max_seqlen_q is not None and max_seqlen_kv is not None
        assert cu_seqlens_q_padded is None and cu_seqlens_kv_padded is None and not pad_between_seqs
        lengths = cu_seqlens_q.diff().tolist()
        # What no sequence holds, a real kernel leaves unwritten.
        assert sum(lengths) == q.shape[0] == k.shape[0] and max(lengths) == max_seqlen_q == max_seqlen_kv
        parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat([self._attend(*part, causal, window) for part in parts]).flatten(1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: tuple[int, int]) -> Tensor:
        """One sequence: ``[s, h, d]`` and ``[s, g, d]`` to ``[s, h, d]``."""
        heads, tokens = q.shape[1], q.shape[0]
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
        ahead = torch.arange(tokens)[None, :] - torch.arange(tokens)[:, None]
        hidden = (ahead > 0) & torch.tensor(causal)
        if window[0] >= 0:
            hidden = hidden | (ahead < -window[0])
        scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * self.flash_attention.softmax_scale
        scores = scores.masked_fill(hidden, -torch.inf)
        if self.softmax_offset is not None:
            assert self.softmax_offset.shape == (heads,)
            offsets = self.softmax_offset.float().reshape(-1, 1, 1).expand(-1, tokens, 1)
            weights = torch.cat((scores, offsets), dim=-1).softmax(dim=-1)[..., :-1]
        else:
            weights = scores.softmax(dim=-1)
        if self.training and self.attention_dropout:
            with self.dropout_context():
                weights = torch.nn.functional.dropout(weights, self.attention_dropout)
        return torch.einsum("hqk,khd->qhd", weights, v.float()).to(q.dtype)
