"""What follows from the flags and from the arguments that Megatron has validated."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron import precision, rounds
from megatron_flexsp.megatron.degrees import degrees_of
from megatron_flexsp.planner import CostModel

PLANNER_FLAGS = {
    "token_capacity": "--flexsp-max-tokens-per-rank",
    "recomputed_token_capacity": "--flexsp-max-recomputed-tokens-per-rank",
    "degrees": "--flexsp-degrees",
    "lengths": "--seq-length",
}
"""What stands in errors in the place of the planner's parameters."""


@dataclass(frozen=True)
class Settings:
    """The flags' values, checked, with what follows from Megatron's own arguments."""

    schedule: str
    in_rounds: bool
    """Whether every rank must run one micro-batch in each round, whatever the schedule."""
    static_degree: int | None
    degrees: tuple[int, ...]
    """Group sizes that plans may use, narrowest first."""
    cost_model: CostModel | None
    """The measured one, if a file was given."""
    max_tokens_per_rank: int | None
    recompute: bool
    """Whether plans may have micro-batches that recompute their activations."""
    recomputes_everything: bool
    """Whether all micro-batches do, by Megatron's own flag."""
    max_recomputed_tokens_per_rank: int | None
    exchange_parts: int
    """In how many parts heads are exchanged, at most."""
    samples: str
    """``--flexsp-samples``"""
    overlong: str
    autotune: bool
    """Refit the cost model to the job's own steps."""
    sft: bool
    """Sequences are conversations, not documents."""
    plan_ahead: int
    solver_time_limit_seconds: float
    mock_lengths: str | None
    trace: str | None
    """Folder for a trace of the run."""
    profile: str | None
    """Where to write the cost model that is measured instead of training."""
    profile_seconds: float
    domain_size: int
    query_heads: int
    """Attention heads of a tensor-parallel rank; groups of ranks that can't share them evenly are rings."""
    slice_multiple: int
    """What a rank's slice must divide by: for sequence parallelism and kernels of 8 bits."""
    count_multiple: int
    """What a rank's micro-batch count must divide by: the interleaved schedule's group size."""
    pipeline_stages: int
    micro_batches_in_flight: int
    """Micro-batches whose activations the first pipeline stage holds at once."""


def settings_from_args(args: argparse.Namespace) -> Settings:
    """What follows from checked flags and the arguments that Megatron has validated.

    Raises
    ------
    FlexSPError
        If the cost model's file is broken, or schedule or degrees are not for this job.
    """
    domain_size, sft = domain_size_of(args), takes_conversations(args)
    pipeline_size = args.pipeline_model_parallel_size
    # Megatron's validation sets it; None where stages are in one piece.
    chunks = getattr(args, "virtual_pipeline_model_parallel_size", None)
    count_multiple, in_flight = 1, pipeline_size
    if chunks is not None and pipeline_size > 1:
        count_multiple = args.microbatch_group_size_per_vp_stage or pipeline_size
        # The first stage runs this many forward chunks before its first backward frees one, in units
        # of a whole stage (schedules.py, get_pp_rank_microbatches).
        in_flight = -(-(2 * (pipeline_size - 1) + (chunks - 1) * count_multiple + 1) // chunks)
    cost_model = None if args.flexsp_cost_model is None else CostModel.load(args.flexsp_cost_model)
    return Settings(
        schedule=_schedule(args),
        in_rounds=rounds.why_rounds(args) is not None,
        static_degree=args.flexsp_static_degree,
        degrees=degrees_of(args, domain_size, cost_model),
        cost_model=cost_model,
        max_tokens_per_rank=args.flexsp_max_tokens_per_rank,
        recompute=args.flexsp_recompute,
        recomputes_everything=args.recompute_granularity == "full",
        max_recomputed_tokens_per_rank=args.flexsp_max_recomputed_tokens_per_rank,
        exchange_parts=args.flexsp_exchange_parts,
        samples=args.flexsp_samples,
        overlong=args.flexsp_overlong or ("truncate" if sft else "split"),
        autotune=args.flexsp_autotune and args.flexsp_profile is None,
        sft=sft,
        plan_ahead=args.flexsp_plan_ahead,
        solver_time_limit_seconds=1.0 if args.flexsp_solver_time_limit is None else args.flexsp_solver_time_limit,
        mock_lengths=args.flexsp_mock_lengths,
        trace=args.flexsp_trace,
        profile=args.flexsp_profile,
        profile_seconds=args.flexsp_profile_seconds,
        domain_size=domain_size,
        query_heads=args.num_attention_heads // args.tensor_model_parallel_size,
        slice_multiple=precision.slice_multiple(args),
        count_multiple=count_multiple,
        pipeline_stages=pipeline_size,
        micro_batches_in_flight=in_flight,
    )


def _schedule(args: argparse.Namespace) -> str:
    """The schedule asked for, or the fastest one that the job's parallelism allows."""
    reason = rounds.why_rounds(args)
    if args.flexsp_schedule in ("nested", "batch-adaptive") and reason is not None:
        raise FlexSPError(
            f"--flexsp-schedule {args.flexsp_schedule}: {reason}, and ranks would run different numbers of them",
            "set auto or lockstep",
        )
    if args.flexsp_schedule != "auto":
        return str(args.flexsp_schedule)
    return "nested" if reason is None else "lockstep"


def domain_size_of(args: argparse.Namespace) -> int:
    """Data-parallel ranks, out of which groups are formed."""
    return int(args.world_size // (args.tensor_model_parallel_size * args.pipeline_model_parallel_size))


def takes_conversations(args: argparse.Namespace) -> bool:
    """Whether samples are conversations. With packs of its own, a script asks for --sft to read cu_seqlens too."""
    return bool(getattr(args, "sft", False)) and args.flexsp_samples != "packed"
