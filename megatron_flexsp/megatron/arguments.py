"""The flags: registered beside Megatron's own, checked before any process group or GPU is touched."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

from megatron_flexsp.compatibility import refusals
from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron import precision, recomputation, rounds
from megatron_flexsp.megatron.degrees import degrees_of
from megatron_flexsp.planner import ASKABLE_SCHEDULES, CostModel
from megatron_flexsp.tried import OLDEST_TRANSFORMER_ENGINE

_SINKS_TRANSFORMER_ENGINE, _SINKS_CUDNN = (2, 12), (9, 18)
"""The first that attend over packs with another softmax than the usual one."""

PLANNER_FLAGS = {
    "token_capacity": "--flexsp-max-tokens-per-rank",
    "recomputed_token_capacity": "--flexsp-max-recomputed-tokens-per-rank",
    "degrees": "--flexsp-degrees",
    "lengths": "--seq-length",
}
"""What stands in errors in the place of the planner's parameters."""

OVERLONG = ("split", "truncate", "drop", "error")
SAMPLES = ("documents", "packed")


def add_flexsp_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Register the flags in a group of their own, as Megatron registers its own."""
    group = parser.add_argument_group(title="flexsp")
    group.add_argument(
        "--flexsp",
        action="store_true",
        help="Train with a context-parallel group for each document, chosen anew for every global batch. "
        "A sample is then one document, --global-batch-size counts documents, and --seq-length is the "
        "longest sequence.",
    )
    group.add_argument(
        "--flexsp-schedule",
        choices=ASKABLE_SCHEDULES,
        default="auto",
        help="How micro-batches are ordered. nested: wide groups first, nobody waits. lockstep: all ranks run "
        "the same number of micro-batches, as the FlexSP paper has it. static: one degree for all, the "
        "baseline. batch-adaptive: the best single degree for each batch, another baseline. auto: the fastest one "
        "that the job's parallelism allows.",
    )
    group.add_argument(
        "--flexsp-static-degree",
        type=int,
        metavar="D",
        help="Ranks in every group under --flexsp-schedule static. Default: the fewest that hold the longest sequence.",
    )
    group.add_argument(
        "--flexsp-degrees",
        metavar="D,D,...",
        help="Group sizes that plans may use, for example 1,2,8: powers of two or the whole data-parallel "
        "size. Default: all that divide the attention heads of a tensor-parallel rank, and wider ones where "
        "--flexsp-max-tokens-per-rank leaves the longest sequence too large for those. Wider ones use ring attention.",
    )
    group.add_argument(
        "--flexsp-cost-model",
        metavar="PATH",
        help="JSON file with the measured costs of this model on this cluster. Default: estimated from the "
        "model's arguments.",
    )
    group.add_argument(
        "--flexsp-autotune",
        action="store_true",
        help="Correct the cost model by the job's own step times, every 20 steps: overheads, and how fast compute and "
        "exchange are. Later plans rest on it; the log says what changed.",
    )
    group.add_argument(
        "--flexsp-max-tokens-per-rank",
        type=int,
        metavar="TOKENS",
        help="Tokens that one rank can hold in one micro-batch; replaces what the cost model says of memory. "
        "What fitted before is a good start: micro-batch size x sequence length / context-parallel size.",
    )
    group.add_argument(
        "--flexsp-recompute",
        action="store_true",
        help="Plans may recompute the activations of single micro-batches, so that a rank holds more tokens of them: "
        "of sequences that would fit in no other way, or only in wider groups that cost more. All others keep "
        "theirs, unless recomputing everything in fewer micro-batches is faster; take --recompute-granularity full "
        "out.",
    )
    group.add_argument(
        "--flexsp-max-recomputed-tokens-per-rank",
        type=int,
        metavar="TOKENS",
        help="Tokens that one rank can hold in a micro-batch whose activations are recomputed: what fits under "
        "--recompute-granularity full; with a pipeline less, since its other micro-batches keep theirs. Default: what "
        "the cost model says, in proportion to --flexsp-max-tokens-per-rank where that is given.",
    )
    group.add_argument(
        "--flexsp-exchange-parts",
        type=int,
        default=1,
        metavar="PARTS",
        help="Exchange the attention heads of a group in so many parts, or as many as they divide into, so that the "
        "exchange of one part hides behind the attention of another. Pays where wide groups wait long for their "
        "all-to-alls; costs more and smaller kernels.",
    )
    group.add_argument(
        "--flexsp-samples",
        choices=SAMPLES,
        default="documents",
        help="What a sample is. documents: one document of --data-path, or under --sft one conversation. packed: one "
        "of the script's own data sets, a pack of sequences with cu_seqlens; --global-batch-size counts packs, as "
        "without FlexSP, and the sequences of a batch are planned.",
    )
    group.add_argument(
        "--flexsp-overlong",
        choices=OVERLONG,
        help="What becomes of documents longer than --seq-length. split (the default): consecutive pieces, each a "
        "sequence of its own. truncate (the default of --sft): their beginning is kept. drop: they are left out. "
        "error: stop.",
    )
    group.add_argument(
        "--flexsp-plan-ahead",
        type=int,
        default=2,
        metavar="STEPS",
        help="Steps for which plans are made in the background while training goes on.",
    )
    group.add_argument(
        "--flexsp-solver-time-limit",
        type=float,
        metavar="SECONDS",
        help="The longest that the planner may improve one plan. Default: 1, and 0.1 under "
        "--sequence-packing-scheduler flexsp, which plans only one step ahead.",
    )
    group.add_argument(
        "--flexsp-trace",
        metavar="DIR",
        help="Write each step's plan, and when every micro-batch ran on every rank, into this folder; "
        "`flexsp report DIR` shows it.",
    )
    group.add_argument(
        "--flexsp-profile",
        metavar="PATH",
        help="Measure this job instead of training it, write its cost model to this JSON file, and compare planned "
        "steps with it. Switches FlexSP on. Give the file to --flexsp-cost-model afterwards.",
    )
    group.add_argument(
        "--flexsp-profile-seconds",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="How long --flexsp-profile measures steps. Every kind of step is run three to nine times.",
    )
    group.add_argument(
        "--flexsp-mock-lengths",
        metavar="SPEC",
        help="Document lengths for --mock-data: lognormal:mean=1024,sigma=1.5,min=128,max=8192, or a file with "
        "one length on each line.",
    )
    return parser


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
    domain_size = _domain_size(args)
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
    sft = _takes_conversations(args)
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


def _domain_size(args: argparse.Namespace) -> int:
    return int(args.world_size // (args.tensor_model_parallel_size * args.pipeline_model_parallel_size))


def _takes_conversations(args: argparse.Namespace) -> bool:
    """Whether samples are conversations. With packs of its own, a script asks for --sft to read cu_seqlens too."""
    return bool(getattr(args, "sft", False)) and args.flexsp_samples != "packed"


def settings_from_args(args: argparse.Namespace) -> Settings:
    """What follows from checked flags and the arguments that Megatron has validated.

    Raises
    ------
    FlexSPError
        If the cost model's file is broken, or schedule or degrees are not for this job.
    """
    domain_size, sft = _domain_size(args), _takes_conversations(args)
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
