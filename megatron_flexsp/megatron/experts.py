"""What mixtures of experts ask of a job's other flags: the schedule, and what can't be right over packs."""

from __future__ import annotations

import argparse

from megatron_flexsp.errors import FlexSPError


def why_rounds(args: argparse.Namespace) -> str | None:
    """Why all ranks must run their micro-batches side by side, as under the lockstep schedule; None if they needn't.

    With a tensor-parallel group's experts all inside of that group, a rank exchanges tokens with nobody who may be in
    another micro-batch.
    """
    if not args.num_experts:
        return None
    tensor_size = args.tensor_model_parallel_size
    expert_size = args.expert_model_parallel_size
    expert_tensor_size = args.expert_tensor_parallel_size or tensor_size
    if expert_size * expert_tensor_size > tensor_size:
        return (
            f"experts lie on several data-parallel ranks (--expert-model-parallel-size {expert_size} x "
            f"--expert-tensor-parallel-size {expert_tensor_size}), which exchange tokens in every micro-batch"
        )
    if "global_aux_loss" in args.moe_router_load_balancing_type:
        return "global_aux_loss adds up over all ranks in every micro-batch"
    return None


def refusals(args: argparse.Namespace) -> dict[str, object]:
    """Messages, and whether each applies."""
    if not args.num_experts:
        return {}
    balancing = args.moe_router_load_balancing_type
    balancing = {balancing} if isinstance(balancing, str) else set(balancing)
    backend = getattr(args, "moe_flex_dispatcher_backend", "deepep") if args.moe_token_dispatcher_type == "flex" else ""
    recomputed = args.recompute_granularity == "full" or "moe" in (args.recompute_modules or ())
    return {
        "--moe-router-load-balancing-type sinkhorn and quantile_balancing: where a token goes would depend on the "
        "tokens beside it, and so on the plan. Use aux_loss, seq_aux_loss or none": (
            balancing & {"sinkhorn", "quantile_balancing"}
        ),
        "--moe-expert-capacity-factor and --moe-expert-rank-capacity-factor: which tokens are dropped would depend on "
        "the plan. Take them out: no token is dropped then": (
            (args.moe_expert_capacity_factor or -1) >= 0
            or getattr(args, "moe_expert_rank_capacity_factor", None) is not None
        ),
        "--moe-router-load-balancing-type global_aux_loss: it is not tried yet. Use aux_loss or seq_aux_loss": (
            "global_aux_loss" in balancing
        ),
        "--num-experts with --pipeline-model-parallel-size > 1: it is not tried yet": (
            args.pipeline_model_parallel_size > 1
        ),
        "--moe-input-jitter-eps: the noise would depend on the plan": args.moe_input_jitter_eps,
        "--moe-enable-routing-replay: a recorded route is one of Megatron's own micro-batches": (
            getattr(args, "moe_enable_routing_replay", False)
        ),
        "--overlap-moe-expert-parallel-comm: it runs layers of two micro-batches by turns, and they may differ in "
        "length": getattr(args, "overlap_moe_expert_parallel_comm", False),
        "--moe-flex-dispatcher-backend ncclep: its buffers have one size, micro-batches have many": backend == "ncclep",
        "--moe-flex-dispatcher-backend hybridep without --moe-hybridep-pad-uneven-dispatch-inputs (Megatron 0.19): it "
        "takes for granted that all ranks have equally many tokens": (
            backend == "hybridep" and not getattr(args, "moe_hybridep_pad_uneven_dispatch_inputs", False)
        ),
        "--num-experts with --tensor-model-parallel-size > 1 and no --sequence-parallel, which Megatron doesn't "
        "train": args.tensor_model_parallel_size > 1 and not args.sequence_parallel,
        "--num-experts with --fp8-format or --fp4-format and recomputed experts: Transformer Engine's recomputation "
        "doesn't tell a router which micro-batch is running": (
            recomputed and (getattr(args, "fp8", None) or getattr(args, "fp4", None))
        ),
    }


def check_profile(args: argparse.Namespace) -> None:
    """Refuse to measure a job whose ranks must stay in step: measured steps leave some of them without work."""
    reason = why_rounds(args)
    if reason is not None:
        raise FlexSPError(
            f"--flexsp-profile: {reason}, and steps that are measured don't keep to rounds. Measure the job with "
            "--expert-model-parallel-size 1 and fewer experts, or train with the estimated cost model"
        )


def routed_layers(args: argparse.Namespace) -> int:
    """How many layers have experts."""
    if not args.num_experts:
        return 0
    every = args.moe_layer_freq
    return sum(every) if isinstance(every, list) else -(-args.num_layers // every)


def weights_of_layer(args: argparse.Namespace, matrices: int) -> tuple[float, float]:
    """Weights that a token meets in a layer with experts, and the part of the layer's weights that lies on a rank.

    ``matrices`` is how many an expert has.
    """
    if not args.num_experts:
        return 0.0, 0.0
    width, tensor_size = args.hidden_size, args.tensor_model_parallel_size
    expert = matrices * width * (args.moe_ffn_hidden_size or args.ffn_hidden_size)
    shared = matrices * width * (args.moe_shared_expert_intermediate_size or 0)
    router = width * args.num_experts
    ranks = args.expert_model_parallel_size * (args.expert_tensor_parallel_size or tensor_size)
    met = args.moe_router_topk * expert + shared + router
    return met, args.num_experts * expert / ranks + shared / tensor_size + router


def token_dispatcher(args: argparse.Namespace) -> str:
    """The ``--moe-token-dispatcher-type`` of the job.

    Megatron's default, allgather, takes for granted that all ranks have equally many tokens; its configuration refuses
    that together with micro-batches of different lengths, even where there are no experts to dispatch to.
    """
    chosen: str = args.moe_token_dispatcher_type
    return "alltoall" if chosen == "allgather" or not args.num_experts else chosen
