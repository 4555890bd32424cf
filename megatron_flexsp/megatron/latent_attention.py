"""Multi-latent attention over packs: positions for the rotary embedding that each of its layers makes for itself.

Releases differ in how such a layer lays out a pack. So queries, keys and values are made as of no pack, which is the
same in all of them: ``[t, 1, H, width]``, with one row of angles for each token. The attention itself knows the pack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_flexsp.megatron.packed_attention import FlexSPPackedSeqParams, PackedLength
from megatron_flexsp.megatron.seams import Seam


def _query_key_value(original: Callable[..., Any]) -> Callable[..., Any]:
    """``MLASelfAttention.get_query_key_value_tensors`` that turns each token of a slice by its own position."""

    def get_query_key_value_tensors(
        self: Any,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        inference_context: Any = None,
        **others: Any,
    ) -> Any:
        if not isinstance(packed_seq_params, FlexSPPackedSeqParams):
            return original(
                self, hidden_states, key_value_states, position_ids, packed_seq_params, inference_context, **others
            )
        with _rotary_length(self.rotary_pos_emb, PackedLength.of(packed_seq_params)):
            return original(self, hidden_states, key_value_states, position_ids, None, inference_context, **others)

    return get_query_key_value_tensors


@contextmanager
def _rotary_length(rotary_pos_emb: Any, length: PackedLength) -> Iterator[None]:
    """Has a layer's own embedding answer with a pack's length for the time of one call."""
    own = rotary_pos_emb.__dict__
    own["get_rotary_seq_len"] = lambda *args, **kwargs: length
    try:
        yield
    finally:
        del own["get_rotary_seq_len"]


def _cached_cos_sin(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """``YarnRotaryEmbedding.get_cached_cos_sin``, which the fused kernels of multi-latent attention are given.

    For a pack it returns ``[t, 1, 1, width]``: the kernels take row ``i`` for token ``i``.
    """

    def get_cached_cos_sin(self: Any, seq_len: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(seq_len, PackedLength):
            return original(self, seq_len, *args, **kwargs)
        cos, sin = original(self, seq_len.table_length, *args, **kwargs)
        return cos.index_select(0, seq_len.positions), sin.index_select(0, seq_len.positions)

    return get_cached_cos_sin


def seams() -> list[Seam]:
    """What is changed where a model has multi-latent attention."""
    return [
        Seam(
            "megatron.core.transformer.multi_latent_attention:MLASelfAttention.get_query_key_value_tensors",
            ("self", "hidden_states", "key_value_states", "position_ids", "packed_seq_params", "inference_context"),
            _query_key_value,
            "hands on the positions of a slice",
        ),
        Seam(
            "megatron.core.models.common.embeddings.yarn_rotary_pos_embedding:YarnRotaryEmbedding.get_cached_cos_sin",
            ("self", "seq_len"),
            _cached_cos_sin,
            "turns each token by its position in its document, in fused kernels",
        ),
    ]
