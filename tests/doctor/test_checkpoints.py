"""Parameters of models that are known, from the arguments that make them."""

from argparse import Namespace

import pytest

from megatron_flexsp.doctor.checkpoints import bytes_per_parameter, parameter_count

LLAMA = {
    "num_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "group_query_attention": False,
    "num_query_groups": 1,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "swiglu": True,
    "ffn_hidden_size": 11008,
    "num_experts": None,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
    "moe_layer_freq": 1,
    "moe_ffn_hidden_size": None,
    "moe_shared_expert_intermediate_size": None,
    "max_position_embeddings": 1024,
    "multi_latent_attention": False,
    "mtp_num_layers": None,
}
LLAMA_3 = LLAMA | {"ffn_hidden_size": 14336, "group_query_attention": True, "num_query_groups": 8}
MIXTRAL = LLAMA_3 | {"num_experts": 8}
DEEPSEEK_V2_LITE = LLAMA | {
    "num_layers": 27,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "ffn_hidden_size": 10944,
    "num_experts": 64,
    "moe_layer_freq": [0] + [1] * 26,
    "moe_ffn_hidden_size": 1408,
    "moe_shared_expert_intermediate_size": 2816,
    "multi_latent_attention": True,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "qk_layernorm": True,
}
DEEPSEEK_V3 = DEEPSEEK_V2_LITE | {
    "num_layers": 61,
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "ffn_hidden_size": 18432,
    "num_experts": 256,
    "moe_layer_freq": [0] * 3 + [1] * 58,
    "moe_ffn_hidden_size": 2048,
    "moe_shared_expert_intermediate_size": 2048,
    "q_lora_rank": 1536,
}
# With the layer that predicts one more token, whose embedding and output matrix are the model's own.
FURTHER = DEEPSEEK_V3 | {"mtp_num_layers": 1}
GPT2 = LLAMA | {
    "num_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "kv_channels": 64,
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "swiglu": False,
    "ffn_hidden_size": 3072,
    "untie_embeddings_and_output_weights": False,
    "position_embedding_type": "learned_absolute",
}


@pytest.mark.parametrize(
    ("model", "vocabulary", "published"),
    [
        (LLAMA, 32_000, 6_738_415_616),
        (LLAMA_3, 128_256, 8_030_261_248),
        (GPT2, 50_257, 124_439_808),
        (MIXTRAL, 32_000, 46_702_792_704),
        (DEEPSEEK_V2_LITE, 102_400, 15_706_484_224),
        (DEEPSEEK_V3, 129_280, 671_026_404_352),
        (FURTHER, 129_280, 671_026_404_352 + 11_610_067_968),
    ],
    ids=["Llama 2 7B", "Llama 3 8B", "GPT-2", "Mixtral 8x7B", "DeepSeek-V2-Lite", "DeepSeek-V3", "DeepSeek-V3 MTP"],
)
def test_published_models_have_as_many(model: dict[str, object], vocabulary: int, published: int) -> None:
    assert parameter_count(Namespace(**model), vocabulary) == published


def test_the_optimizer_is_most_of_a_checkpoint() -> None:
    args = Namespace(bf16=True, fp16=False, no_save_optim=None, optimizer="adam", use_distributed_optimizer=True)
    assert bytes_per_parameter(args) == 14
    args.no_save_optim = True
    assert bytes_per_parameter(args) == 2
