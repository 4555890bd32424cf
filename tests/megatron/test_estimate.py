"""The cost model that stands in for a measured one."""

import argparse

import pytest
import torch

from megatron_flexsp.megatron.estimate import estimate_cost_model, exchange_bytes_per_token

HEADS, GROUPS, HEAD_WIDTH, LAYERS = 8, 2, 128, 4


def arguments(**others: object) -> argparse.Namespace:
    given = {
        "num_layers": LAYERS, "hidden_size": 1024, "ffn_hidden_size": 4096, "num_attention_heads": HEADS,
        "kv_channels": HEAD_WIDTH, "group_query_attention": True, "num_query_groups": GROUPS, "swiglu": True,
        "padded_vocab_size": 1000, "vocab_size": None, "params_dtype": torch.bfloat16, "recompute_granularity": None,
        "sequence_parallel": False, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
        "data_parallel_size": 32, "use_distributed_optimizer": True, "seq_length": 4096, "num_experts": None,
        "moe_layer_freq": 1, "multi_latent_attention": False, "mtp_num_layers": None,
    }  # fmt: skip
    return argparse.Namespace(**(given | others))


def test_a_ring_pays_for_the_keys_and_values_that_it_passes_on() -> None:
    args = arguments()
    model = estimate_cost_model(args, (1, 8, 16, 32), gpu=(9, 80 << 30), ranks_per_node=8, micro_batches_in_flight=1)
    network = 20e9

    def exchange_seconds(degree: int) -> float:
        """Of a token of the pack, latency aside."""
        return model.exchange_bytes_per_token / degree / model.exchange_bandwidth_bytes_per_second[degree]

    # A rank of a ring of blocks of 8 holds one key/value head: 2 x 128 values of 2 bytes forward; backward the same,
    # and gradients of 4 bytes.
    passed = LAYERS * 2 * HEAD_WIDTH * (2 + 2 + 4)
    assert exchange_seconds(16) == pytest.approx((exchange_bytes_per_token(args) / 16 + passed / 2) / network)
    assert exchange_seconds(32) == pytest.approx((exchange_bytes_per_token(args) / 32 + passed * 3 / 4) / network)
    # Eight ranks share the heads: no ring.
    assert model.exchange_bandwidth_bytes_per_second[8] == 150e9


@pytest.mark.parametrize(("chunks", "layers_with_experts"), [(None, 2), (2, 1)])
def test_a_rank_holds_its_experts_of_the_stage_with_most_of_them(chunks: int | None, layers_with_experts: int) -> None:
    """Of 8 layers on 4 stages the fifth and the sixth have experts: both on one stage, or interleaved on two."""
    args = arguments(
        num_layers=8, moe_layer_freq=[0, 0, 0, 0, 1, 1, 0, 0], pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=chunks, num_experts=8, expert_model_parallel_size=4,
        expert_tensor_parallel_size=1, moe_ffn_hidden_size=512, moe_shared_expert_intermediate_size=None,
        moe_router_topk=2,
    )  # fmt: skip
    model = estimate_cost_model(args, (1,), gpu=(9, 80 << 30), ranks_per_node=8, micro_batches_in_flight=4)
    width, dense_layers = 1024, 2 - layers_with_experts
    everywhere = width * (2 * (2 * HEADS + 2 * GROUPS) * HEAD_WIDTH + 1000)
    everywhere += dense_layers * 3 * width * 4096 + layers_with_experts * width * 8
    experts = layers_with_experts * 8 / 4 * 3 * width * 512
    # 32 data-parallel ranks share the optimizer's state, 8 of them that of the same experts.
    assert model.model_state_bytes == pytest.approx(everywhere * (6 + 12 / 32) + experts * (6 + 12 / 8))
    # Two experts keep 2 x (2 x 1024 + 3 x 512) values of a token, and the router's side one of 1024.
    kept = 2 * 34 * width + layers_with_experts * (2 * (width + 2 * (2 * width + 3 * 512)) - 19 * width)
    assert model.activation_bytes_per_token == pytest.approx(kept + 6 * 1000)


LATENT = {
    "multi_latent_attention": True, "q_lora_rank": None, "kv_lora_rank": 512, "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64, "v_head_dim": 128, "recompute_modules": None,
}  # fmt: skip


def test_latent_attention_has_a_key_and_a_value_for_every_query_head() -> None:
    """Two all-to-alls forward and two backward carry queries and keys of 192 values, values and results of 128."""
    args = arguments(**LATENT)
    assert exchange_bytes_per_token(args) == 2 * LAYERS * HEADS * (192 + 192 + 128 + 128) * 2
    ordinary = arguments(group_query_attention=False, kv_channels=160)
    options = {"gpu": (9, 80 << 30), "ranks_per_node": 8, "micro_batches_in_flight": 1}
    model, other = (estimate_cost_model(each, (1, 16), **options) for each in (args, ordinary))
    assert model.attention_seconds_per_token_squared == other.attention_seconds_per_token_squared
    # Its ring, with fewer ranks than heads in a block, passes values on as wide as keys.
    ring, other_ring = (
        each.exchange_bytes_per_token / each.exchange_bandwidth_bytes_per_second[16] for each in (model, other)
    )
    exchanged = exchange_bytes_per_token(args)
    assert ring * 20e9 - exchanged == pytest.approx((other_ring * 20e9 - exchanged) * 192 / 160)


def test_recomputed_projections_keep_the_latents_alone() -> None:
    options = {"gpu": (9, 80 << 30), "ranks_per_node": 8, "micro_batches_in_flight": 1}
    kept = [
        estimate_cost_model(arguments(**LATENT | changes), (1,), **options)
        for changes in ({}, {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mla_up_proj"]})
    ]
    fewer = kept[0].activation_bytes_per_token - kept[1].activation_bytes_per_token
    # And the kernel's wider copies of values and its wider result.
    assert fewer == LAYERS * HEADS * (192 + 192 + 128 + 64 + 192) * 2


def test_a_recomputed_micro_batch_keeps_what_goes_into_its_layers_and_one_layer() -> None:
    options = {"gpu": (9, 80 << 30), "ranks_per_node": 8, "micro_batches_in_flight": 1}
    model = estimate_cost_model(arguments(), (1, 8), **options)
    width, logits = 1024, 6 * 1000
    # Among 8 ranks, the kernel keeps its result and four copies of 2 key and 2 value heads.
    layer = 34 * width + 2 * (width + 3 * 4 * HEAD_WIDTH)
    assert model.activation_bytes_per_token == LAYERS * layer + logits
    assert model.recomputed_activation_bytes_per_token == LAYERS * 2 * width + layer + logits
    # A run that recomputes everything is one of such micro-batches: its third forward costs as much.
    always = estimate_cost_model(arguments(recompute_granularity="full"), (1, 8), **options)
    assert always.activation_bytes_per_token == model.recomputed_activation_bytes_per_token
    assert always.recomputed_activation_bytes_per_token == 0
    for degree in (1, 8):
        again = model.micro_batch_seconds([700, 3000], degree, recomputed=True)
        assert always.micro_batch_seconds([700, 3000], degree) == pytest.approx(again)
