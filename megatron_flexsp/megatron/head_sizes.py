"""The sizes of a model's attention from its arguments, ordinary and multi-latent."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_flexsp.runtime import key_value_heads_needed, ring_size_of


@dataclass(frozen=True)
class HeadSizes:
    """Heads of the whole model's attention, not of one tensor-parallel rank."""

    query_heads: int

    key_value_heads: int

    key_width: int
    """Values of one head's query and of its key."""

    value_width: int
    """Values of one head's value and of its result."""

    @property
    def query_values(self) -> int:
        """Values of a token's queries."""
        return self.query_heads * self.key_width

    @property
    def result_values(self) -> int:
        """Values of what attention makes of a token."""
        return self.query_heads * self.value_width

    @property
    def key_value_values(self) -> int:
        """Values of a token's keys and values."""
        return self.key_value_heads * (self.key_width + self.value_width)

    @property
    def widest(self) -> int:
        """The width that all are brought to where a kernel takes only one."""
        return max(self.key_width, self.value_width)


def head_sizes(args: argparse.Namespace) -> HeadSizes:
    """Of a job's arguments. In multi-latent attention every query head has a key and a value of its own."""
    heads = args.num_attention_heads
    if is_latent(args):
        return HeadSizes(heads, heads, args.qk_head_dim + args.qk_pos_emb_head_dim, args.v_head_dim)
    groups = args.num_query_groups if args.group_query_attention else heads
    return HeadSizes(heads, groups, args.kv_channels, args.kv_channels)


def attention_weights(args: argparse.Namespace) -> tuple[int, int]:
    """Weights of a layer's projections: those that tensor-parallel ranks share, and those that each of them has."""
    sizes, width = head_sizes(args), args.hidden_size
    shared = sizes.result_values * width
    if not is_latent(args):
        return shared + width * (sizes.query_values + sizes.key_value_values), 0
    down = width * (args.kv_lora_rank + args.qk_pos_emb_head_dim)
    shared += args.kv_lora_rank * sizes.query_heads * (args.qk_head_dim + args.v_head_dim)
    if args.q_lora_rank is None:
        return shared + width * sizes.query_values, down
    return shared + args.q_lora_rank * sizes.query_values, down + width * args.q_lora_rank


def latent_activations(args: argparse.Namespace) -> tuple[int, int]:
    """Values of a token that a layer of multi-latent attention keeps beyond an ordinary one whose heads fill its width.

    Those that tensor-parallel ranks share, and those that are shared only under sequence parallelism. An ordinary
    layer keeps queries, keys, values and the result, each as wide as the hidden state.
    """
    if not is_latent(args):
        return 0, 0
    sizes = head_sizes(args)
    kept = sizes.result_values - args.hidden_size
    if "mla_up_proj" in (args.recompute_modules or ()):
        kept -= 3 * args.hidden_size
    else:
        kept += sizes.query_values + sizes.key_value_values - 3 * args.hidden_size
    # Before and after their norm; one head's rotated part serves all.
    return kept, 2 * (args.kv_lora_rank + (args.q_lora_rank or 0)) + args.qk_pos_emb_head_dim


def kept_apart(args: argparse.Namespace, degrees: Iterable[int]) -> float:
    """Values of a token that attention's kernel keeps and the layer around it doesn't, the most for any of the degrees.

    They are shared among tensor-parallel ranks. Between two all-to-alls a kernel keeps tensors of its own: its result,
    which at degree 1 the next projection keeps, too; every copy of a key/value head; queries, keys and values where the
    layer lets go of its own (``mla_up_proj``). Where widths differ it works on widened copies at every degree. What
    recomputed attention makes anew is not kept.
    """
    selective = args.recompute_granularity == "selective"
    modules = (args.recompute_modules or ("core_attn",)) if selective else ()
    if "core_attn" in modules:
        return 0.0
    sizes, tensor_size = head_sizes(args), args.tensor_model_parallel_size
    heads, groups = sizes.query_heads // tensor_size, max(1, sizes.key_value_heads // tensor_size)
    widens = sizes.key_width != sizes.value_width
    lets_go = is_latent(args) and "mla_up_proj" in modules
    widened = sizes.key_value_heads * (sizes.widest - sizes.value_width)
    most = 0.0
    for degree in degrees:
        kept = float(widened)
        if degree > 1 or widens:
            kept += sizes.query_heads * sizes.widest
        if degree > 1:
            ranks = degree // ring_size_of(degree, heads)
            copies = key_value_heads_needed(groups, ranks) / groups
            kept += (copies - 1) * 2 * sizes.key_value_heads * sizes.widest
        if lets_go and degree > 1:
            kept += sizes.query_values + sizes.key_value_values
        elif lets_go and widens:
            kept += sizes.key_value_heads * sizes.value_width
        most = max(most, kept)
    return most


def is_latent(args: argparse.Namespace) -> bool:
    """Whether the job has multi-latent attention."""
    return bool(args.multi_latent_attention)
