"""What can't be combined with ``--flexsp-recompute``."""

from __future__ import annotations

import argparse

from megatron_flexsp.compatibility.refusal import Refusal


def recomputes_some(args: argparse.Namespace) -> bool:
    """Whether plans may recompute single micro-batches."""
    return bool(getattr(args, "flexsp_recompute", False))


def _is_selective(args: argparse.Namespace) -> bool:
    """Whether all micro-batches recompute single modules; ``--recompute-activations`` is an older name for it."""
    return bool(args.recompute_granularity == "selective" or getattr(args, "recompute_activations", False))


RECOMPUTE_REFUSALS = (
    Refusal(
        flags=("--recompute-granularity",),
        subject="--flexsp-recompute with --recompute-granularity full",
        reason="everything is recomputed already",
        remedy="take --recompute-granularity out, and --recompute-method and --recompute-num-layers with it; "
        "--flexsp-max-tokens-per-rank is then what fits without",
        applies=lambda args: args.recompute_granularity == "full",
    ),
    Refusal(
        flags=("--recompute-modules", "--moe-layer-recompute"),
        subject="--flexsp-recompute with --recompute-modules other than core_attn",
        reason="Megatron doesn't recompute these inside of layers that are recomputed",
        remedy="leave core_attn, or take --flexsp-recompute out",
        applies=lambda args: (
            getattr(args, "moe_layer_recompute", False)
            or (_is_selective(args) and set(args.recompute_modules or ()) - {"core_attn"})
        ),
    ),
    Refusal(
        flags=("--cpu-offloading-num-layers",),
        subject="--flexsp-recompute with --cpu-offloading-num-layers",
        reason="Megatron doesn't offload layers that are recomputed",
        remedy="take one of them out",
        applies=lambda args: (
            getattr(args, "cpu_offloading", False) or (getattr(args, "cpu_offloading_num_layers", None) or 0) > 0
        ),
    ),
    Refusal(
        flags=("--distribute-saved-activations",),
        subject="--flexsp-recompute with --distribute-saved-activations",
        reason="Megatron distributes them only where it recomputes everything",
        remedy="use --sequence-parallel, which does so with all activations",
        applies=lambda args: getattr(args, "distribute_saved_activations", False),
    ),
    Refusal(
        flags=("--mtp-use-repeated-layer",),
        subject="--flexsp-recompute with --mtp-use-repeated-layer and --overlap-grad-reduce, without a pipeline",
        reason="Megatron reduces a gradient once as many parts of it have come as in the first step; that of a layer "
        "which runs for each depth comes in one part where it is kept, and in one for each depth where it is "
        "recomputed",
        remedy="take one of them out",
        # The last stage of a pipeline reduces when all of its backward passes are done.
        applies=lambda args: (
            getattr(args, "mtp_use_repeated_layer", False)
            and getattr(args, "overlap_grad_reduce", False)
            and args.pipeline_model_parallel_size == 1
        ),
    ),
)
