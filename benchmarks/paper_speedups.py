"""The Wikipedia columns of the FlexSP paper's main figure, simulated, beside what nested plans give.

    python benchmarks/paper_speedups.py --lengths wikipedia_lengths.txt           # 40 batches, some minutes
    python benchmarks/paper_speedups.py --lengths wikipedia_lengths.txt --quick   # 2 batches

Under the authors' rules (64 A100s and the cost models that they published for them, batches of 512, each sequence
padded to 128 tokens, degrees 2 to 64, longer sequences left out) it plans every batch with the static degree 64, with
the best single degree of each batch and in lockstep; and nested under our own rules (no padding, degrees 1 to 64).
Prints a table in Markdown. The paper's GitHub and CommonCrawl columns can't be simulated: their lengths aren't public.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_flexsp.planner import load_cost_model
from megatron_flexsp.planner.batches import BatchSource, with_longest
from megatron_flexsp.planner.lengths_file import read_lengths
from megatron_flexsp.simulator.comparison import Cluster, Outcome, compare

RANKS = 64
BATCH = 512
AUTHORS_PADDING = 128
AUTHORS_DEGREES = (2, 4, 8, 16, 32, 64)
DEEPSPEED_DEGREE = 64

PAPER = {
    "gpt-7b-192k": (1.72, 1.34),
    "gpt-13b-192k": (1.59, 1.31),
    "gpt-30b-192k": (1.64, 1.23),
    "gpt-7b-384k": (1.46, 1.32),
    "gpt-13b-384k": (1.43, 1.21),
    "gpt-30b-384k": (1.53, 1.18),
}
"""FlexSP and the batch-adaptive baseline over DeepSpeed on Wikipedia, as measured (arXiv 2412.01523, figure 4)."""


def outcomes(lengths: NDArray[np.int64], name: str, batches: int) -> dict[str, Outcome]:
    """What every strategy makes of the same sequences."""
    longest = int(name.removesuffix("k").rpartition("-")[2]) * 1000
    kept = with_longest(lengths, longest, "drop")
    padded = -(-kept // AUTHORS_PADDING) * AUTHORS_PADDING
    authors = Cluster(
        cost_model=load_cost_model(name),
        domain_size=RANKS,
        degrees=AUTHORS_DEGREES,
        static_degree=DEEPSPEED_DEGREE,
    )
    ours = Cluster(cost_model=load_cost_model(name), domain_size=RANKS)
    found = {}
    for source, cluster, strategies in (
        (padded, authors, ("static", "batch-adaptive", "lockstep")),
        (kept, ours, ("nested",)),
    ):
        drawn = BatchSource(source, "--lengths", None).batches(BATCH, batches)
        found |= {strategy: Outcome(strategy) for strategy in strategies}
        steps = compare(drawn, strategies, cluster)
        for strategy, number, made, timeline in track(
            steps,
            total=len(drawn) * len(strategies),
            description=f"{name}: {', '.join(strategies)}",
            console=Console(stderr=True),
            transient=True,
        ):
            found[strategy].add(made, drawn[number], timeline)
    return found


def rows(lengths: NDArray[np.int64], batches: int) -> Iterator[str]:
    """The table, a line for each model and context."""
    yield (
        "| model, context | FlexSP over DeepSpeed: paper | simulated | off by | batch-adaptive over DeepSpeed: paper "
        "| simulated | nested over DeepSpeed, simulated | nested over lockstep |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for name, (flexsp, adaptive) in PAPER.items():
        found = outcomes(lengths, name, batches)
        static, lockstep = found["static"], found["lockstep"]
        speed = lockstep.speed_over(static)
        yield (
            f"| {name} | {flexsp:.2f} | {speed:.2f} | {speed / flexsp - 1:+.0%} | {adaptive:.2f} "
            f"| {found['batch-adaptive'].speed_over(static):.2f} | {found['nested'].speed_over(static):.2f} "
            f"| {found['nested'].speed_over(lockstep):.2f} |"
        )


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, required=True, help="a text file, one length a line")
    parser.add_argument("--batches", type=int, default=40, help="batches of each model and context")
    parser.add_argument("--quick", action="store_true", help="two batches")
    options = parser.parse_args(arguments)
    lengths = read_lengths(options.lengths)
    for row in rows(lengths, 2 if options.quick else options.batches):
        print(row, flush=True)


if __name__ == "__main__":
    main()
