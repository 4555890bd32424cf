"""Refuses, before any process group or GPU is touched, flags that make no sense here or don't go together."""

from __future__ import annotations

import argparse
import os

from megatron_flexsp.compatibility import refusals
from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron import precision, recomputation
from megatron_flexsp.megatron.settings import domain_size_of, takes_conversations
from megatron_flexsp.tried import OLDEST_TRANSFORMER_ENGINE

_SINKS_TRANSFORMER_ENGINE, _SINKS_CUDNN = (2, 12), (9, 18)
"""The first that attend over packs with another softmax than the usual one."""


def transformer_engine_problems(args: argparse.Namespace) -> list[FlexSPError]:
    """Why Transformer Engine can't be used as it is installed."""
    # Imported here: the others read arguments alone.
    from megatron.core.utils import get_te_version

    found = get_te_version()
    if found.release == (0, 0, 0):
        return [
            FlexSPError(
                "--transformer-impl transformer_engine (Megatron's default): Transformer Engine can't be imported",
                "install it (pip install 'transformer-engine[pytorch]'), or set --transformer-impl local",
            )
        ]
    if found.release < OLDEST_TRANSFORMER_ENGINE:
        oldest = ".".join(map(str, OLDEST_TRANSFORMER_ENGINE))
        return [
            FlexSPError(
                f"Transformer Engine {found}: {oldest} or newer is needed",
                "upgrade it, or set --transformer-impl local",
            )
        ]
    softmax = getattr(args, "softmax_type", "vanilla")
    if softmax == "vanilla":
        return []
    if found.release < _SINKS_TRANSFORMER_ENGINE:
        oldest = ".".join(map(str, _SINKS_TRANSFORMER_ENGINE))
        return [
            FlexSPError(
                f"--softmax-type {softmax}: Transformer Engine {found} has no kernel of it for packs",
                f"upgrade it to {oldest} or newer",
            )
        ]
    cudnn = None if os.environ.get("FLEXSP_DEVICE") == "cpu" else _cudnn_version()
    if cudnn is not None and cudnn < _SINKS_CUDNN:
        return [
            FlexSPError(
                f"--softmax-type {softmax}: cuDNN {cudnn[0]}.{cudnn[1]} has no kernel of it for packs, so that "
                "Transformer Engine would hold every sequence's square of scores",
                f"install cuDNN {_SINKS_CUDNN[0]}.{_SINKS_CUDNN[1]} or newer",
            )
        ]
    return []


def _cudnn_version() -> tuple[int, int] | None:
    """Of the library that PyTorch finds, and Transformer Engine with it."""
    import torch  # here, as above

    number = torch.backends.cudnn.version()
    if number is None:
        return None
    # Until version 8 the minor release stood in the hundreds below thousands.
    return (number // 10_000, number // 100 % 100) if number >= 90_000 else (number // 1_000, number // 100 % 10)


def check_compatibility(args: argparse.Namespace) -> None:
    """Refuse, in one message, every flag of the job that FlexSP can't be combined with."""
    problems = [refusal.problem for refusal in refusals(args)]
    if args.transformer_impl == "transformer_engine":
        problems += transformer_engine_problems(args)
    if problems:
        raise FlexSPError("--flexsp can't be combined with\n  - " + "\n  - ".join(map(str, problems)))


def check_flags(args: argparse.Namespace) -> None:
    """Check the flags against each other and against the shape of the job, before Megatron validates its own.

    Raises
    ------
    FlexSPError
        Where a value is out of range, the world doesn't divide, or flags don't go together.
    """
    _check_shape(args)
    _check_values(args)
    recomputation.check_arguments(args)
    _check_samples(args)


def _check_shape(args: argparse.Namespace) -> None:
    model_parallel_size = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    if args.world_size % model_parallel_size:
        raise FlexSPError(
            f"{args.world_size} ranks don't divide by --tensor-model-parallel-size "
            f"{args.tensor_model_parallel_size} x --pipeline-model-parallel-size "
            f"{args.pipeline_model_parallel_size} = {model_parallel_size}",
            "start a multiple of that many",
        )
    domain_size = domain_size_of(args)
    if args.global_batch_size is not None and args.global_batch_size % domain_size:
        raise FlexSPError(
            f"--global-batch-size {args.global_batch_size} must be a multiple of the {domain_size} data-parallel "
            f"ranks ({args.world_size} ranks / {model_parallel_size})",
            "change it, or the number of ranks",
        )
    if args.num_attention_heads is None:  # needed here before Megatron asks for it
        raise FlexSPError("--num-attention-heads is missing", "give it, as Megatron needs it too")


def _check_values(args: argparse.Namespace) -> None:
    slice_multiple = precision.slice_multiple(args)
    for flag, value, least in (
        ("--flexsp-plan-ahead", args.flexsp_plan_ahead, 1),
        ("--flexsp-exchange-parts", args.flexsp_exchange_parts, 1),
        ("--flexsp-solver-time-limit", args.flexsp_solver_time_limit, 0),
        ("--flexsp-profile-seconds", args.flexsp_profile_seconds, 0),
        ("--flexsp-max-tokens-per-rank", args.flexsp_max_tokens_per_rank, slice_multiple),
        ("--flexsp-max-recomputed-tokens-per-rank", args.flexsp_max_recomputed_tokens_per_rank, slice_multiple),
    ):
        if value is not None and not value >= least:  # nan is not
            raise FlexSPError(f"{flag} {value}: must be at least {least}", "raise it")
    if args.flexsp_static_degree is not None and args.flexsp_schedule != "static":
        raise FlexSPError(
            f"--flexsp-static-degree needs --flexsp-schedule static; found {args.flexsp_schedule}",
            "take it out, or set that schedule",
        )
    if args.flexsp_profile is not None and args.flexsp_cost_model is not None:
        raise FlexSPError(
            "--flexsp-profile with --flexsp-cost-model: it measures a cost model", "take --flexsp-cost-model out"
        )
    if args.flexsp_profile is not None and args.skip_train:
        raise FlexSPError("--flexsp-profile with --skip-train: it runs training steps", "take --skip-train out")
    if args.flexsp_mock_lengths is not None and not args.mock_data:
        raise FlexSPError("--flexsp-mock-lengths needs --mock-data", "add --mock-data, or take the lengths out")


def _check_samples(args: argparse.Namespace) -> None:
    packed = args.flexsp_samples == "packed"
    for flag, given in (
        ("--flexsp-overlong", args.flexsp_overlong is not None),
        ("--flexsp-mock-lengths", args.flexsp_mock_lengths is not None),
    ):
        if packed and given:
            raise FlexSPError(
                f"{flag} with --flexsp-samples packed: the script's own samples are taken", f"take {flag} out"
            )
    sft = takes_conversations(args)
    if sft and args.tokenizer_type != "SFTTokenizer":
        raise FlexSPError(
            f"--sft needs --tokenizer-type SFTTokenizer; found {args.tokenizer_type}", "set that tokenizer"
        )
    if sft and args.mock_data:
        raise FlexSPError("--sft with --mock-data: there are no conversations to tokenise", "take one of them out")
    if sft and args.flexsp_overlong == "split":
        raise FlexSPError(
            "--flexsp-overlong split with --sft: the end of a conversation makes no sense without its beginning",
            "choose truncate, drop or error",
        )
