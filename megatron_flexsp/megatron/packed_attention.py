"""Megatron's attention and rotary embedding for packs: what a layer needs to know of its micro-batch.

Hidden states stay ``[t, 1, width]``, Megatron's unpacked layout with a batch of one, so that nothing between
two attentions notices the pack. Only the two operations that mix or number tokens are told of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from megatron_flexsp.megatron.seams import Seam
from megatron_flexsp.runtime import PackLayout, RingSchedule, SequenceGroup, ring_attention, ulysses_attention
from megatron_flexsp.runtime.attention import packed_causal_attention
from megatron_flexsp.runtime.ulysses import Kernel

ATTENTION_PARAMETERS = (
    *("self", "query", "key", "value"),
    *("attention_mask", "attn_mask_type", "attention_bias", "packed_seq_params"),
)
"""What the forward of every core attention must take."""


@dataclass
class FlexSPPackedSeqParams(PackedSeqParams):
    """Travels from the model's call to every attention.

    ``qkv_format`` is ``sbhd``: for ``thd`` Megatron would split rotary embedding and slices by its own
    zigzag rule, and read ``cu_seqlens`` back from the device in every layer.
    """

    qkv_format: str = "sbhd"
    layout: PackLayout | None = None
    group: SequenceGroup | None = None
    positions: Tensor | None = None
    """Each local token's position in its sequence, int64 ``[t]``, on the device."""
    ring: RingSchedule | None = None
    """There where the group has more ranks than there are heads to share."""
    whole_pack: PackedSeqParams | None = None
    """What a kernel for packs is told, which sees all tokens of some heads."""
    successors: Any = None
    """What multi-token prediction rolls tensors to, where there is any (``multi_token_prediction.Successors``)."""
    parts: int = 1
    """In how many parts heads are exchanged, at most; 1 in a ring, whose transfers hide behind attention already."""

    @classmethod
    def of(
        cls,
        layout: PackLayout,
        group: SequenceGroup,
        positions: Tensor,
        cu_seqlens: Tensor,
        ring: RingSchedule | None,
        parts: int = 1,
    ) -> FlexSPPackedSeqParams:
        """Of one micro-batch; ``positions``, the whole pack's ``cu_seqlens`` and the ring's table are on the device."""
        # The pack's padding is a segment of its own, so that nothing of it stays unwritten.
        longest = layout.longest_segment
        whole_pack = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        return cls(
            layout=layout,
            group=group,
            positions=positions,
            ring=ring,
            whole_pack=whole_pack,
            parts=parts if ring is None else 1,
        )


class PackedLength(int):
    """The rotary length of a pack, carrying the positions to where the embedding is made."""

    positions: Tensor

    @classmethod
    def of(cls, params: FlexSPPackedSeqParams) -> PackedLength:
        """Of one micro-batch."""
        assert params.layout is not None and params.positions is not None
        length = cls(params.layout.longest_segment)
        length.positions = params.positions
        return length

    @property
    def table_length(self) -> int:
        """How many positions to ask Megatron's tables for, which it caches by length: few powers of two."""
        return 1 << (int(self) - 1).bit_length()


def attention_forward(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``DotProductAttention.forward`` that knows packs."""

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        if not isinstance(packed_seq_params, FlexSPPackedSeqParams):
            return original(self, query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params)
        layout, group, parts = packed_seq_params.layout, packed_seq_params.group, packed_seq_params.parts
        assert layout is not None and group is not None
        # Under query-key layer scaling Megatron divides the scores by the layer's number and multiplies
        # by it inside the softmax; together that is one factor.
        scale = self.softmax_scale * (self.scale_mask_softmax.scale or 1.0)
        kernel: Kernel
        random_states: AbstractContextManager[None] = nullcontext()
        if packed_seq_params.ring is None:
            dropout = self.attention_dropout.p if self.training else 0.0
            kernel = partial(
                packed_causal_attention, segment_lengths=layout.segment_lengths, softmax_scale=scale, dropout=dropout
            )
            if dropout and not self.config.sequence_parallel:
                # Tensor-parallel ranks have other heads and must drop other weights; under sequence parallelism
                # the whole layer runs on states of its own already.
                random_states = get_cuda_rng_tracker().fork()
        else:
            kernel = partial(ring_attention, schedule=packed_seq_params.ring, group=group, softmax_scale=scale)
        with random_states:
            out_tHD = ulysses_attention(query.squeeze(1), key.squeeze(1), value.squeeze(1), group, kernel, parts)
        return out_tHD.reshape(query.shape[0], 1, -1)

    return forward


def rotary_length(original: Callable[..., int]) -> Callable[..., int]:
    """``RotaryEmbedding.get_rotary_seq_len`` that hands on a pack's positions."""

    def get_rotary_seq_len(
        self: Any,
        inference_context: Any,
        transformer: Any,
        transformer_input: Tensor,
        transformer_config: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **others: Any,
    ) -> int:
        if not isinstance(packed_seq_params, FlexSPPackedSeqParams):
            return original(
                self,
                inference_context,
                transformer,
                transformer_input,
                transformer_config,
                packed_seq_params,
                **others,
            )
        return PackedLength.of(packed_seq_params)

    return get_rotary_seq_len


def rotary_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """``RotaryEmbedding.forward`` (and YaRN's) that gives each token of a slice its own angles.

    Returns ``[t, 1, 1, width]`` for a pack; YaRN's comes with its scale, as the original's does.
    """

    def forward(self: Any, max_seq_len: int, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(max_seq_len, PackedLength):
            return original(self, max_seq_len, *args, **kwargs)
        table = original(self, max_seq_len.table_length)
        if isinstance(table, tuple):
            return table[0].index_select(0, max_seq_len.positions), *table[1:]
        return table.index_select(0, max_seq_len.positions)

    # Megatron's own clear-the-cache calls must still find the original's cache.
    for name in ("cache_clear", "cache_info"):
        if hasattr(original, name):
            setattr(forward, name, getattr(original, name))
    return forward


def seams() -> list[Seam]:
    """What is changed in every model."""
    rotary = "megatron.core.models.common.embeddings"
    return [
        Seam(
            "megatron.core.transformer.dot_product_attention:DotProductAttention.forward",
            ATTENTION_PARAMETERS,
            attention_forward,
            "attends over packs, on the pack's own group",
        ),
        Seam(
            f"{rotary}.rotary_pos_embedding:RotaryEmbedding.get_rotary_seq_len",
            (
                *("self", "inference_context", "transformer"),
                *("transformer_input", "transformer_config", "packed_seq_params"),
            ),
            rotary_length,
            "hands on the positions of a slice",
        ),
        *(
            Seam(
                f"{rotary}.{embedding}.forward",
                ("self", "max_seq_len"),
                rotary_forward,
                "turns each token by its position in its document",
            )
            for embedding in (
                "rotary_pos_embedding:RotaryEmbedding",
                "yarn_rotary_pos_embedding:YarnRotaryEmbedding",
            )
        ),
    ]
