"""The flags, registered beside Megatron's own."""

from __future__ import annotations

import argparse

from megatron_flexsp.planner import ASKABLE_SCHEDULES
from megatron_flexsp.planner.batches import OVERLONG

_SAMPLES = ("documents", "packed")


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
        choices=_SAMPLES,
        default="documents",
        help="What a sample is. documents: one document of --data-path, or under --sft one conversation. packed: one "
        "of the script's own data sets, a pack of sequences with cu_seqlens; --global-batch-size counts packs, as "
        "without FlexSP, and the sequences of a batch are planned.",
    )
    group.add_argument(
        "--flexsp-overlong",
        choices=(*OVERLONG, "error"),
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
