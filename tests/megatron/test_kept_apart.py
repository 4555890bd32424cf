"""What an estimate says that attention's kernel keeps beside the layer is what autograd keeps."""

import argparse
from functools import partial

import pytest
import torch
from torch import Tensor

from megatron_flexsp.megatron.head_sizes import head_sizes, kept_apart
from megatron_flexsp.profiler.memory import SavedBytes
from megatron_flexsp.runtime import SequenceGroup, at_one_width, ulysses_attention
from megatron_flexsp.runtime.attention import packed_causal_attention
from megatron_flexsp.runtime.groups import PendingExchange

TOKENS = 8


class Alone(SequenceGroup):
    """A group whose other ranks hold what this one holds."""

    def begin_exchange_in_block(self, outgoing: Tensor, aside: bool) -> PendingExchange:
        outgoing = outgoing.contiguous()
        return PendingExchange(outgoing.clone(), outgoing, None)


def arguments(heads: int, groups: int, latent: bool = False, modules: list[str] | None = None) -> argparse.Namespace:
    return argparse.Namespace(
        num_attention_heads=heads, group_query_attention=True, num_query_groups=groups, kv_channels=32,
        multi_latent_attention=latent, qk_head_dim=32, qk_pos_emb_head_dim=16, v_head_dim=32,
        tensor_model_parallel_size=1, recompute_granularity="selective" if modules else None, recompute_modules=modules,
    )  # fmt: skip


def saved_bytes(args: argparse.Namespace, degree: int) -> float:
    """Of a token, from queries, keys and values to the projection of the result."""
    sizes = head_sizes(args)
    attend = partial(packed_causal_attention, segment_lengths=(TOKENS * degree,), softmax_scale=1.0)
    kernel = at_one_width(lambda *qkv: attend(*(x.contiguous() for x in qkv)))
    heads = sizes.query_heads, sizes.key_value_heads, sizes.key_value_heads
    widths = sizes.key_width, sizes.key_width, sizes.value_width
    qkv = [torch.randn(TOKENS, *shape, requires_grad=True).bfloat16() for shape in zip(heads, widths, strict=True)]
    weight = torch.randn(4, sizes.result_values, requires_grad=True).bfloat16()
    # What mla_up_proj lets go of, the layer doesn't keep.
    excluded = (weight, *qkv) if args.recompute_modules else (weight,)
    with SavedBytes(excluded) as saved:
        out = ulysses_attention(*qkv, Alone(degree, 0), kernel)
        projected = torch.nn.functional.linear(out.reshape(TOKENS, -1), weight)
        assert projected.requires_grad  # and still there: what it keeps counts
        return saved.held / TOKENS


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("args", "values_in_layer"),
    [
        (arguments(8, 8), 4 * 8 * 32),
        (arguments(8, 2), (2 * 8 + 2 * 2) * 32),
        (arguments(8, 8, latent=True), 8 * (48 + 48 + 32 + 32)),
        (arguments(8, 8, latent=True, modules=["mla_up_proj"]), 8 * 32),
    ],
    ids=["ordinary", "grouped", "latent", "latent, projections recomputed"],
)
def test_it_is_what_autograd_keeps(args: argparse.Namespace, values_in_layer: int, degree: int) -> None:
    statistics = 4 * args.num_attention_heads  # of the softmax, in 32 bits: an estimate leaves them out
    expected = 2 * (values_in_layer + kept_apart(args, (degree,)))
    assert saved_bytes(args, degree) == pytest.approx(expected + statistics)
