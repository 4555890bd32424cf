"""What --flexsp-exchange-parts brings behind a slow link, on this machine's CPU.

    python benchmarks/exchange_parts.py

Two emulated hosts of four ranks each (Linux, root). Documents of 2,048 to 4,096 tokens run in groups of all eight ranks
with two attention heads a rank, exchanged in one part and in two. Runs take turns; first steps are not counted.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness.corpora import Corpus, cut
from benchmarks.harness.hosts import EmulatedHosts, why_not
from benchmarks.harness.jobs import Job
from benchmarks.harness.model import CONTEXT_TOKENS, RANKS, ROOT, flexsp_arguments, training_arguments
from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.prepare import Record

PARTS = (1, 2)
DOCUMENTS_PER_STEP = RANKS
console = Console(highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind (%(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="steps of a run (%(default)s)")
    parser.add_argument("--megabits", type=float, default=70, help="of the link, a second (%(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "exchange_parts", help="where logs go")
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first is not counted")
    reason = why_not()
    if reason is not None:
        raise FlexSPError(f"two hosts can't be emulated: {reason}")
    corpus = Corpus("long_documents", "", long_documents, DOCUMENTS_PER_STEP)
    prefix, _ = corpus.prepare(options.output)
    seconds: dict[int, list[float]] = {parts: [] for parts in PARTS}
    for number in range(options.rounds):
        for parts in PARTS if number % 2 == 0 else PARTS[::-1]:
            job_arguments = training_arguments(prefix, DOCUMENTS_PER_STEP, options.steps) + flexsp_arguments("static")
            job_arguments += ["--num-attention-heads", str(2 * RANKS), "--flexsp-exchange-parts", str(parts)]
            job_arguments += ["--flexsp-static-degree", str(RANKS)]
            with EmulatedHosts(RANKS // 2, options.megabits * 1e6) as hosts:
                job = Job(f"parts_{parts}_{number}", job_arguments, options.output, hosts)
                try:
                    job.wait_until_ready()
                    steps = [job.run_step()["seconds"] for _ in range(options.steps)]
                    job.finish()
                finally:
                    job.stop()
            seconds[parts] += steps[1:]
            console.print(f"{parts} part{'s' * (parts > 1)}: " + " ".join(f"{value:6.2f} s" for value in steps))
    means = {parts: statistics.mean(values) for parts, values in seconds.items()}
    console.print(f"in {PARTS[1]} parts {means[PARTS[0]] / means[PARTS[1]]:.2f} times as fast as in one")
    return 0


def long_documents() -> Iterator[Record]:
    """Documents that all ranks must share, or nearly so."""
    return cut(np.random.default_rng(0).integers(CONTEXT_TOKENS // 2, CONTEXT_TOKENS, 200))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FlexSPError as error:
        console.print(f"[red]exchange_parts: {error}")
        sys.exit(2)
