"""How good the planner's plans are and how long they take, against the authors' solver and against the bounds.

    python benchmarks/planner.py --lengths wikipedia_lengths.txt          # everything, some minutes
    python benchmarks/planner.py --lengths wikipedia_lengths.txt --quick  # one batch of each sort

Prints tables in Markdown. Solve times are seconds of one core's time (``time.process_time``). Neighbours slow a
core down all the same, so the first line says how fast this one counts to ten million.

The authors' figures come from their own solver (PKU-DAIR/Hetu-Galvatron, branch flexsp; SCIP) under the same cost
models, on two cores.
"""

import argparse
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_flexsp.planner import CostModel, Plan, load_cost_model, plan

Lengths = NDArray[np.int64]

LONGEST = 192_000
BATCH = 512
RANKS = 64
WIKIPEDIA_BATCHES = (3, 4, 5)
AUTHORS_SECONDS = {
    "gpt-7b-192k": (3.622, 3.558, 3.318),
    "gpt-13b-192k": (6.135, 6.049, 5.692),
    "gpt-30b-192k": (14.566, 14.398, 13.930),
}
AUTHORS_DEGREES = (2, 4, 8, 16, 32, 64)
AUTHORS_PADDING = 128
NESTED_TARGETS = {"gpt-7b-192k": 0.83, "gpt-13b-192k": 0.84, "gpt-30b-192k": 0.86}
LOCKSTEP_TARGETS = {"gpt-7b-192k": 0.94, "gpt-13b-192k": 0.94, "gpt-30b-192k": 0.95}
SAMPLES = {"GitHub-like": (700, 1.8), "mid-length": (1600, 1.0)}
SCALES = ((1024, 8192), (16384, 131072))
SCALE_SAMPLES = {"Wikipedia-like": (400, 1.3), "GitHub-like": (700, 1.8), "mid-length": (1600, 1.0)}


@dataclass(frozen=True)
class Measured:
    """A plan and what it took."""

    plan: Plan
    seconds: float

    @property
    def gap(self) -> float:
        """How far the plan lies above its bound."""
        return self.plan.predicted_seconds / self.plan.lower_bound_seconds - 1


def measure(lengths: Lengths, cost_model: CostModel, ranks: int, **settings: object) -> Measured:
    """Plan a batch and check the plan's laws."""
    started = time.process_time()
    made = plan(lengths, cost_model, ranks, **settings)  # type: ignore[arg-type]
    seconds = time.process_time() - started
    made.validate(lengths, cost_model.token_capacity)
    return Measured(made, seconds)


def counting_seconds() -> float:
    """How long this core takes to count to ten million in Python."""
    started = time.process_time()
    number = 0
    while number < 10_000_000:
        number += 1
    return time.process_time() - started


def lognormal(median: float, sigma: float, count: int, seed: int) -> Lengths:
    """Lengths that are lognormal, cut off at 190,000 tokens."""
    drawn = np.random.default_rng(seed).lognormal(np.log(median), sigma, count)
    return np.clip(drawn.astype(np.int64), 1, 190_000)


def with_wider_degrees(cost_model: CostModel, widest: int) -> CostModel:
    """The cost model with bandwidths beyond degree 64 that continue the trend of 32 to 64."""
    bandwidth = dict(cost_model.exchange_bandwidth_bytes_per_second)
    trend, degree = bandwidth[64] / bandwidth[32], 128
    while degree <= widest:
        bandwidth[degree] = bandwidth[degree // 2] * trend
        degree *= 2
    return replace(cost_model, exchange_bandwidth_bytes_per_second=bandwidth)


def against_the_authors(wikipedia: Lengths, schedule: str, targets: dict[str, float]) -> Iterator[str]:
    """Totals over the three Wikipedia batches beside the authors' totals, for each model."""
    yield "| model | authors s | ours s | ours / authors | to reach | gap to bound | solve s (theirs: 11 to 12) |"
    yield "|---|---|---|---|---|---|---|"
    for name, target in targets.items():
        cost_model = load_cost_model(name)
        found = []
        for number in WIKIPEDIA_BATCHES:
            batch = wikipedia[number * BATCH : (number + 1) * BATCH]
            if schedule == "lockstep":
                padded = -(-batch // AUTHORS_PADDING) * AUTHORS_PADDING
                found.append(measure(padded, cost_model, RANKS, schedule="lockstep", degrees=AUTHORS_DEGREES))
            else:
                found.append(measure(batch, cost_model, RANKS))
        authors = sum(AUTHORS_SECONDS[name])
        ours = sum(item.plan.predicted_seconds for item in found)
        each = ", ".join(f"{item.plan.predicted_seconds:.3f}" for item in found)
        yield (
            f"| {name} | {authors:.3f} | {ours:.3f} ({each}) | {ours / authors:.3f} | {target} "
            f"| {np.mean([item.gap for item in found]):.2%} | {max(item.seconds for item in found):.3f} |"
        )


def gaps(wikipedia: Lengths, schedule: str, seeds: range, wikipedia_batches: range) -> Iterator[str]:
    """Gap to the bound and solve time over many batches of each sort, for each model."""
    yield f"| sample, {schedule} | model | batches | mean gap | worst gap | mean solve s | 95 % of solves under, s |"
    yield "|---|---|---|---|---|---|---|"
    for name in NESTED_TARGETS:
        cost_model = load_cost_model(name)
        batches = {"Wikipedia": [wikipedia[number * BATCH : (number + 1) * BATCH] for number in wikipedia_batches]}
        for sample, (median, sigma) in SAMPLES.items():
            batches[sample] = [lognormal(median, sigma, BATCH, seed) for seed in seeds]
        for sample, lengths in batches.items():
            found = [measure(batch, cost_model, RANKS, schedule=schedule) for batch in lengths]
            seconds = [item.seconds for item in found]
            yield (
                f"| {sample} | {name} | {len(found)} | {np.mean([item.gap for item in found]):.2%} "
                f"| {max(item.gap for item in found):.2%} | {np.mean(seconds):.3f} "
                f"| {np.quantile(seconds, 0.95):.3f} |"
            )


def scale(scales: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Large domains."""
    yield "| ranks x sequences | sample | seconds | gap to bound | solve s | peak memory of the process so far, MB |"
    yield "|---|---|---|---|---|---|"
    for ranks, sequences in scales:
        cost_model = with_wider_degrees(load_cost_model("gpt-7b-192k"), ranks)
        for sample, (median, sigma) in SCALE_SAMPLES.items():
            found = measure(lognormal(median, sigma, sequences, seed=0), cost_model, ranks)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            yield (
                f"| {ranks} x {sequences} | {sample} | {found.plan.predicted_seconds:.3f} | {found.gap:.2%} "
                f"| {found.seconds:.2f} | {peak} |"
            )


def small() -> Iterator[str]:
    """Batches of a single node."""
    yield "| ranks x sequences | gap to bound | solve s |"
    yield "|---|---|---|"
    cost_model = load_cost_model("gpt-7b-192k")
    for ranks, sequences in ((4, 32), (8, 128), (16, 256)):
        found = measure(lognormal(400, 1.3, sequences, seed=0), cost_model, ranks)
        yield f"| {ranks} x {sequences} | {found.gap:.2%} | {found.seconds:.3f} |"


def main(arguments: list[str] | None = None) -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, required=True, help="a text file, one length a line")
    parser.add_argument("--quick", action="store_true", help="one batch of each sort, and no large domains")
    parser.add_argument("--batches", type=int, default=10, help="batches of each sort, for gaps and solve times")
    options = parser.parse_args(arguments)
    wikipedia = np.loadtxt(options.lengths, dtype=np.int64)
    wikipedia = wikipedia[wikipedia <= LONGEST]
    count = 1 if options.quick else options.batches
    sections = (
        ("Lockstep under the authors' rules", against_the_authors(wikipedia, "lockstep", LOCKSTEP_TARGETS)),
        ("Nested under our own rules", against_the_authors(wikipedia, "nested", NESTED_TARGETS)),
        ("Nested: how close to the bound", gaps(wikipedia, "nested", range(count), range(count))),
        ("Lockstep: how close to the bound", gaps(wikipedia, "lockstep", range(count), range(count))),
        ("Small domains", small()),
        ("Large domains", scale(SCALES[:0] if options.quick else SCALES)),
    )
    print(f"counting to ten million: {counting_seconds():.2f} s")
    for title, rows in sections:
        print(f"\n### {title}\n", flush=True)
        for row in rows:
            print(row, flush=True)


if __name__ == "__main__":
    main()
