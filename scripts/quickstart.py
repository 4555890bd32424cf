"""Trains a small GPT on real text twice, side by side: with static groups and with FlexSP.

Both jobs are Megatron's own training loop on 8 ranks of this machine, with the same model, the same documents
in the same order. They take turns step by step. The end is a table: speed, padding, and both loss curves.

Two corpora, one after the other: the source files of Python's standard library, and the same text cut into
documents as long as those of the web, most of them short.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness.corpora import Corpus, source_files, web_lengths
from benchmarks.harness.hosts import Host
from benchmarks.harness.jobs import Job
from benchmarks.harness.model import RANKS, ROOT, flexsp_arguments, training_arguments
from benchmarks.harness.summary import Summary
from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner import Plan

SCHEDULES = ("static", "nested")
CORPORA = (source_files(24), web_lengths(64))
PLAN_WIDTH = 90
"""Characters in which a step is drawn."""
WARM_UP_STEPS = 1
LOSS_TOLERANCE = 1e-4
"""Relative; both runs start from the same weights and drift apart by rounding alone."""

console = Console()


def main() -> int:
    options = parse_options()
    options.output.mkdir(parents=True, exist_ok=True)
    prepare(options.output)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    compared = [(corpus, *compare(corpus, options, store)) for corpus in CORPORA]
    return report(compared, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="training steps of each run (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "quickstart", help="where logs and results go")
    options = parser.parse_args()
    if options.steps <= WARM_UP_STEPS:
        parser.error(f"--steps must be more than {WARM_UP_STEPS}, which is not counted")
    return options


def prepare(output: Path) -> None:
    """Make the corpora the first time."""
    for corpus in CORPORA:
        console.print(f"corpus: {corpus.title} ...", highlight=False)
        _, summary = corpus.prepare(output)
        if summary is not None:
            console.print(f"  {summary.documents:,} documents, {summary.tokens:,} tokens", highlight=False)


def compare(corpus: Corpus, options: argparse.Namespace, store: torch.distributed.TCPStore) -> tuple[Job, Job]:
    """Both jobs on one corpus, step by step, now one first and then the other."""
    console.rule(corpus.title)
    jobs: list[Job] = []
    try:
        for schedule in SCHEDULES:
            prefix = options.output / corpus.name
            arguments = training_arguments(prefix, corpus.documents_per_step, options.steps)
            arguments += flexsp_arguments(schedule)
            jobs.append(Job(f"{corpus.name}_{schedule}", arguments, options.output, (Host(RANKS),), turns=store))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(f"starting two Megatron jobs of {RANKS} ranks", total=options.steps)
            for job in jobs:
                job.wait_until_ready()
            progress.update(task, description="training")
            for number in range(options.steps):
                for job in jobs if number % 2 == 0 else reversed(jobs):
                    job.run_step()
                progress.console.print(_step_line(number, jobs), highlight=False)
                progress.advance(task)
        for job in jobs:
            job.finish()
    finally:
        for job in jobs:
            job.stop()
    static, nested = jobs
    return static, nested


def _step_line(number: int, jobs: list[Job]) -> str:
    times = " | ".join(f"{job.steps[-1]['schedule']} {job.steps[-1]['seconds']:5.2f} s" for job in jobs)
    return f"step {number + 1:2d} | loss {jobs[-1].steps[-1]['loss']:.4f} | {times}"


def report(compared: list[tuple[Corpus, Job, Job]], options: argparse.Namespace) -> int:
    """Print loss curves, a plan and the table; 1 if the curves differ."""
    largest_difference = max(print_losses(corpus, static, nested) for corpus, static, nested in compared)
    for corpus, _, nested in compared:
        print_plan(corpus, nested.steps[-1])
    speedups = {corpus.name: print_speeds(corpus, static, nested) for corpus, static, nested in compared}
    result = {
        "speedups": speedups,
        "largest_loss_difference": largest_difference,
        "steps": {
            corpus.name: {schedule: job.steps for schedule, job in zip(SCHEDULES, jobs, strict=True)}
            for corpus, *jobs in compared
        },
    }
    (options.output / "result.json").write_text(json.dumps(result))
    console.print(f"logs and figures: {options.output}")
    if largest_difference > LOSS_TOLERANCE:
        console.print(f"[red]the loss curves differ by up to {largest_difference:.1e}; expected {LOSS_TOLERANCE:.0e}")
        return 1
    return 0


def print_losses(corpus: Corpus, static: Job, nested: Job) -> float:
    """Both loss curves; returns their largest relative difference."""
    table = Table("step", "loss, static group", "loss, FlexSP nested", "relative difference", title=corpus.title)
    differences = []
    for number, (first, second) in enumerate(zip(static.steps, nested.steps, strict=True), start=1):
        differences.append(abs(first["loss"] - second["loss"]) / abs(first["loss"]))
        table.add_row(str(number), f"{first['loss']:.6f}", f"{second['loss']:.6f}", f"{differences[-1]:.1e}")
    console.print(table)
    return max(differences)


def print_speeds(corpus: Corpus, static: Job, nested: Job) -> float:
    """What the comparison is about; returns the ratio of the speeds."""
    both = [Summary(job.steps[WARM_UP_STEPS:]) for job in (static, nested)]
    speedup = both[1].tokens_per_second / both[0].tokens_per_second
    table = Table("", "static group", "FlexSP nested", title=corpus.title)
    table.add_row("tokens per second", *(f"{summary.tokens_per_second:,.0f}" for summary in both))
    table.add_row("relative speed", "1.00", f"{speedup:.2f}")
    table.add_row("padding share", *(f"{summary.padding_share:.2%}" for summary in both))
    table.add_row("micro-batches a step", *(f"{summary.micro_batches:.1f}" for summary in both))
    table.add_row("tokens by ranks in their group", *(_shares(summary.tokens_by_degree) for summary in both))
    console.print(table)
    return speedup


def _shares(tokens_by_degree: dict[int, float]) -> str:
    return ", ".join(f"{degree}: {share:.0%}" for degree, share in tokens_by_degree.items())


def print_plan(corpus: Corpus, step: dict[str, Any]) -> None:
    """The last step's plan: a line for each rank, time to the right, each micro-batch drawn with its group's size."""
    plan = Plan.from_json(json.dumps(step["plan"]))
    ends, rows = np.zeros(plan.domain_size), [""] * plan.domain_size
    characters_a_second = PLAN_WIDTH / plan.predicted_seconds
    for item, seconds in zip(plan.micro_batches, step["micro_batch_seconds"], strict=True):
        end = ends[item.first_rank : item.first_rank + item.degree].max() + seconds
        for rank in item.ranks:
            ends[rank] = end
            width = round(end * characters_a_second) - len(rows[rank])
            rows[rank] += (str(item.degree) * (width - 1) + "|") if not item.is_filler else " " * width
    console.print(f"The last step as it was planned ({corpus.title}): time runs to the right, each stretch is a")
    console.print("micro-batch, its digit the number of ranks that share it", highlight=False)
    lines = [f"rank {rank} |{row}" for rank, row in enumerate(rows)]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FlexSPError as error:
        console.print(f"[red]quickstart: {error}", markup=True, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
