"""What a mixture of experts may not have."""

from __future__ import annotations

import argparse

from megatron_flexsp.compatibility.recomputation import recomputes_some
from megatron_flexsp.compatibility.refusal import Refusal


def load_balancing_types(args: argparse.Namespace) -> set[str]:
    """The job's ``--moe-router-load-balancing-type``, one or several."""
    chosen = args.moe_router_load_balancing_type
    return {chosen} if isinstance(chosen, str) else set(chosen)


PADDED_BY_HYBRIDEP = ("moe_hybridep_pad_uneven_dispatch_inputs", "moe_hybridep_pad_variable_tokens")
"""What has HybridEP pad to the rank with the most tokens, from Megatron 0.19 on: its name there, and on dev."""


def flex_backend(args: argparse.Namespace) -> str:
    """The ``--moe-flex-dispatcher-backend`` of a job whose dispatcher is flex; nothing for others."""
    if args.moe_token_dispatcher_type != "flex":
        return ""
    return str(getattr(args, "moe_flex_dispatcher_backend", "deepep"))


EXPERT_REFUSALS = (
    Refusal(
        flags=("--moe-router-load-balancing-type",),
        subject="--moe-router-load-balancing-type sinkhorn and quantile_balancing",
        reason="where a token goes would depend on the tokens beside it, and so on the plan",
        remedy="use aux_loss, seq_aux_loss, global_aux_loss or none",
        applies=lambda args: load_balancing_types(args) & {"sinkhorn", "quantile_balancing"},
    ),
    Refusal(
        flags=("--moe-expert-capacity-factor", "--moe-expert-rank-capacity-factor"),
        subject="--moe-expert-capacity-factor and --moe-expert-rank-capacity-factor",
        reason="which tokens are dropped would depend on the plan",
        remedy="take them out: no token is dropped then",
        applies=lambda args: (
            (args.moe_expert_capacity_factor or -1) >= 0
            or getattr(args, "moe_expert_rank_capacity_factor", None) is not None
        ),
    ),
    Refusal(
        flags=("--moe-input-jitter-eps",),
        subject="--moe-input-jitter-eps",
        reason="the noise would depend on the plan",
        applies=lambda args: args.moe_input_jitter_eps,
    ),
    Refusal(
        flags=("--moe-enable-routing-replay",),
        subject="--moe-enable-routing-replay",
        reason="a recorded route is one of Megatron's own micro-batches",
        applies=lambda args: getattr(args, "moe_enable_routing_replay", False),
    ),
    Refusal(
        flags=("--overlap-moe-expert-parallel-comm",),
        subject="--overlap-moe-expert-parallel-comm",
        reason="it runs layers of two micro-batches by turns, and they may differ in length",
        # It changes speed alone.
        mendable=True,
        applies=lambda args: getattr(args, "overlap_moe_expert_parallel_comm", False),
    ),
    Refusal(
        flags=("--moe-flex-dispatcher-backend",),
        subject="--moe-flex-dispatcher-backend ncclep",
        reason="its buffers have one size, micro-batches have many",
        applies=lambda args: flex_backend(args) == "ncclep",
    ),
    Refusal(
        flags=("--moe-flex-dispatcher-backend",),
        subject="--moe-flex-dispatcher-backend hybridep before Megatron 0.19",
        reason="it takes for granted that all ranks have equally many tokens",
        remedy="use deepep, or a newer Megatron",
        applies=lambda args: (
            flex_backend(args) == "hybridep" and not any(hasattr(args, name) for name in PADDED_BY_HYBRIDEP)
        ),
    ),
    Refusal(
        flags=("--moe-n-hash-layers",),
        subject="--moe-n-hash-layers",
        reason="it is not tried yet",
        applies=lambda args: getattr(args, "moe_n_hash_layers", 0),
    ),
    Refusal(
        flags=("--sequence-parallel",),
        subject="--num-experts with --tensor-model-parallel-size > 1 and no --sequence-parallel",
        reason="Megatron doesn't train it",
        remedy="add --sequence-parallel",
        applies=lambda args: args.tensor_model_parallel_size > 1 and not args.sequence_parallel,
    ),
    Refusal(
        flags=("--fp8-format",),
        subject="--num-experts with --fp8-format and recomputed experts",
        reason="Transformer Engine's recomputation doesn't tell a router which micro-batch is running",
        applies=lambda args: (
            (
                args.recompute_granularity == "full"
                or "moe" in (args.recompute_modules or ())
                or getattr(args, "moe_layer_recompute", False)
                or recomputes_some(args)
            )
            and getattr(args, "fp8", None)
        ),
    ),
)
