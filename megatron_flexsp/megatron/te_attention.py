"""Transformer Engine's packed (THD) attention between our two all-to-alls.

Transformer Engine is told of no context-parallel group: it gets whole sequences, fewer heads, and where each
sequence begins. Written against versions 2.8 to 2.20.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_flexsp.megatron.packed_attention import ATTENTION_PARAMETERS, FlexSPPackedSeqParams
from megatron_flexsp.megatron.seams import Seam
from megatron_flexsp.runtime import SequenceGroup, at_one_width, ring_attention, ulysses_attention
from megatron_flexsp.runtime.ulysses import Kernel


def te_attention_forward(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``TEDotProductAttention.forward`` that knows packs."""

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **others: Any,
    ) -> Tensor:
        if not isinstance(packed_seq_params, FlexSPPackedSeqParams):
            return original(
                self, query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params, **others
            )
        group, whole_pack = packed_seq_params.group, packed_seq_params.whole_pack
        assert group is not None and whole_pack is not None

        def te_kernel(q_ThD: Tensor, k_TgD: Tensor, v_TgD: Tensor) -> Tensor:
            with _heads_of_one_member(self, group, q_ThD, k_TgD):
                out = original(self, q_ThD, k_TgD, v_TgD, None, attn_mask_type, None, whole_pack, **others)
            return out.unflatten(-1, (q_ThD.shape[1], -1))

        kernel: Kernel = te_kernel
        if packed_seq_params.ring is not None:
            # Transformer Engine gives no log-sum-exp, by which the parts of a ring are put together.
            scale = self.flash_attention.softmax_scale
            kernel = partial(ring_attention, schedule=packed_seq_params.ring, group=group, softmax_scale=scale)
        # For packs, few kernels take values of another width than queries, and none on every GPU. Megatron widens
        # them too, for packs of its own. Here they travel as they are.
        kernel = at_one_width(kernel)
        # An offset of each head would have to know which heads are the part's.
        parts = packed_seq_params.parts if self.softmax_offset is None else 1
        out_tHE = ulysses_attention(query.squeeze(1), key.squeeze(1), value.squeeze(1), group, kernel, parts)
        return out_tHE.reshape(query.shape[0], 1, -1)

    return forward


@contextmanager
def _heads_of_one_member(attention: Any, group: SequenceGroup, q_ThD: Tensor, k_TgD: Tensor) -> Iterator[None]:
    """Lets a Transformer Engine attention work on a member's share of its heads, values as wide as queries.

    It asserts its number of key/value heads and their widths, and takes the softmax's offset of every query head, if
    it has any. All are instance attributes, put over its own for the time of one call; the offset's gradient
    still reaches the parameter, of which each member uses its own part.
    """
    heads, width = q_ThD.shape[1:]
    over: dict[str, Any] = {
        "num_gqa_groups_per_partition": k_TgD.shape[1],
        "hidden_size_per_attention_head_k": width,
        "hidden_size_per_attention_head_v": width,
    }
    offset = attention.softmax_offset
    if offset is not None and group.degree > 1:
        over["softmax_offset"] = offset[group.member * heads : (group.member + 1) * heads]
    own = attention.__dict__
    before = {name: own[name] for name in over if name in own}
    own.update(over)
    try:
        yield
    finally:
        for name in over:
            del own[name]
        own.update(before)


def seams() -> list[Seam]:
    """What is changed where Transformer Engine is installed."""
    return [
        Seam(
            "megatron.core.extensions.transformer_engine:TEDotProductAttention.forward",
            ATTENTION_PARAMETERS,
            te_attention_forward,
            "attends over packs, on the pack's own group",
        )
    ]
