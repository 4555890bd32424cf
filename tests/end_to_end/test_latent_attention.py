"""Multi-latent attention: queries and keys of one width, values of another, angles made inside of each layer.

Megatron has it with Transformer Engine alone, so all of this runs over the stand-in.
"""

from collections.abc import Callable
from pathlib import Path

from .conftest import LLAMA, TRANSFORMER_ENGINE
from .test_equality import NESTED_2, TENSOR, assert_equal
from .test_experts import EACH_SEQUENCE, TWO_PARTS

WIDTHS = ("--kv-lora-rank", "16", "--qk-head-dim", "8", "--qk-pos-emb-head-dim", "4", "--v-head-dim", "6")
LATENT = (*LLAMA, *TRANSFORMER_ENGINE, "--multi-latent-attention", *WIDTHS, "--no-rope-fusion")
YARN = ("--rotary-scaling-factor", "4", "--mscale", "0.7", "--mscale-all-dim", "0.9")


def test_yarn_with_sequence_parallel_and_recomputed_projections(
    train: Callable, reference: Callable, even_documents: Path
) -> None:
    # Without sequence parallelism Megatron's tensor-parallel ranks each have a part of a gradient, and don't add it up.
    model = (*LATENT, *YARN, "--q-lora-rank", "12", "--qk-layernorm", *TENSOR, "--sequence-parallel")
    model += ("--data-path", str(even_documents))
    recompute = ("--recompute-granularity", "selective", "--recompute-modules", "core_attn", "mla_up_proj")
    run = train(4, *model, *recompute, plan=NESTED_2, gradients=True)
    assert "MLASelfAttention.get_query_key_value_tensors hands on the positions" in run.output
    assert_equal(run, reference(2, *model))


def test_experts_on_two_ranks_further_tokens_and_rings(train: Callable, reference: Callable) -> None:
    """Four ranks and two heads; projections of the queries without a narrow middle, and plain rotary angles."""
    model = (*LATENT, "--rope-type", "rope", "--num-attention-heads", "2", *EACH_SEQUENCE, *TWO_PARTS)
    model += ("--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "32")
    model += ("--mtp-num-layers", "1", "--moe-layer-freq", "[0,1,1,1]", "--moe-token-dispatcher-type", "alltoall")
    model += (
        "--moe-shared-expert-intermediate-size",
        "32",
    )
    run = train(4, *model, "--flexsp-degrees", "1,2,4", plan="[0123] [01] [2] [3] [0] [1] [23]", gradients=True)
    assert_equal(run, reference(2, *model))
