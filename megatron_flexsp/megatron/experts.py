"""What mixtures of experts ask of a job's other flags: the schedule, and the dispatcher."""

from __future__ import annotations

import argparse

from megatron_flexsp.compatibility import PADDED_BY_HYBRIDEP, flex_backend, load_balancing_types


def why_rounds(args: argparse.Namespace) -> str | None:
    """Why experts want all ranks side by side in their micro-batches; None if they don't.

    With a tensor-parallel group's experts all inside of that group, a rank exchanges tokens with nobody who may be in
    another micro-batch.

    In a pipeline, experts lie on ranks of one stage. In rounds these run equally many micro-batches, and what Megatron
    runs next, 1F1B or interleaved, follows from stage and count alone: all of them make the same passes of the same
    chunks in the same order, recomputation in backward passes included, and none waits for a rank that is elsewhere.
    Nor can stages wait in a circle: take the micro-batches of a round for one, and every wait is one that a single
    pipeline has too.
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
    if "global_aux_loss" in load_balancing_types(args):
        return "global_aux_loss adds up over all ranks in every micro-batch"
    return None


def adds_up_over_groups(args: argparse.Namespace) -> bool:
    """Whether routers add up over a pack's own group: those losses do that are taken over more than a token."""
    return bool(args.num_experts and load_balancing_types(args) & {"aux_loss", "seq_aux_loss"})


def routed_layers(args: argparse.Namespace) -> int:
    """How many layers have experts."""
    if not args.num_experts:
        return 0
    every = args.moe_layer_freq
    return sum(every) if isinstance(every, list) else -(-args.num_layers // every)


def routed_layers_of_a_stage(args: argparse.Namespace) -> int:
    """How many layers with experts the pipeline stage has that has most of them; stages are taken for equally deep."""
    if not args.num_experts:
        return 0
    stages, every = args.pipeline_model_parallel_size, args.moe_layer_freq
    chunks = stages * (getattr(args, "virtual_pipeline_model_parallel_size", None) or 1)
    depth = -(-args.num_layers // chunks)
    counts = [0] * stages
    for layer in range(args.num_layers):
        counts[layer // depth % stages] += every[layer] if isinstance(every, list) else layer % every == 0
    if args.mtp_num_layers:
        counts[-1] += args.mtp_num_layers * is_last_routed(args)
    return max(counts)


def is_last_routed(args: argparse.Namespace) -> bool:
    """Whether the last layer has experts, and with it those that predict further tokens."""
    if not args.num_experts:
        return False
    every = args.moe_layer_freq
    return bool(every[-1]) if isinstance(every, list) else (args.num_layers - 1) % every == 0


def weights_of_layer(args: argparse.Namespace, matrices: int) -> tuple[float, float, float]:
    """Weights that a token meets in a layer with experts; of the layer's experts, and of all else, what a rank holds.

    ``matrices`` is how many an expert has.
    """
    if not args.num_experts:
        return 0.0, 0.0, 0.0
    width, tensor_size = args.hidden_size, args.tensor_model_parallel_size
    expert = matrices * width * (args.moe_ffn_hidden_size or args.ffn_hidden_size)
    shared = matrices * width * (args.moe_shared_expert_intermediate_size or 0)
    router = width * args.num_experts
    ranks = args.expert_model_parallel_size * (args.expert_tensor_parallel_size or tensor_size)
    met = args.moe_router_topk * expert + shared + router
    return met, args.num_experts * expert / ranks, shared / tensor_size + router


def optimizer_ranks(args: argparse.Namespace) -> float:
    """Ranks with the same experts, over which the distributed optimizer shares their state."""
    tensor_size = args.tensor_model_parallel_size
    ranks = args.expert_model_parallel_size * (args.expert_tensor_parallel_size or tensor_size)
    return max(1.0, args.data_parallel_size * tensor_size / ranks)


def kept_bytes_of_layer(args: argparse.Namespace, matrices: int) -> float:
    """Bytes that the experts of a layer keep of a token for the backward pass, at 16 bits, tensor parallelism aside.

    A token goes to several experts: each keeps what came in, what its activation takes and gives, and what goes out.
    """
    if not args.num_experts:
        return 0.0
    width, inner = args.hidden_size, args.moe_ffn_hidden_size or args.ffn_hidden_size
    routed = args.moe_router_topk * (2 * width + matrices * inner)
    return 2.0 * (width + routed + matrices * (args.moe_shared_expert_intermediate_size or 0))


def let_ranks_differ_in_tokens(args: argparse.Namespace) -> None:
    """Choose the token dispatcher that was asked for, or one that works where ranks differ in their tokens.

    Megatron's default, allgather, takes for granted that they have equally many; its configuration refuses that beside
    micro-batches of different lengths, even where there are no experts to dispatch to. HybridEP's buffers are
    padded to the longest rank where it is told to.
    """
    if args.moe_token_dispatcher_type == "allgather" or not args.num_experts:
        args.moe_token_dispatcher_type = "alltoall"
    for name in PADDED_BY_HYBRIDEP:
        if hasattr(args, name) and flex_backend(args) == "hybridep":
            setattr(args, name, True)
