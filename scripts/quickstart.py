"""Trains a small GPT on the standard library's source files twice, side by side: static groups and FlexSP.

Both jobs are Megatron's own training loop on 8 ranks of this machine, with the same model, the same documents
and the same order. They take turns step by step. The end is a table: speed, padding, and both loss curves.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner import Plan
from megatron_flexsp.prepare import MEGATRON_TOKENIZER_ARGUMENTS, StandardLibrary, write_dataset

ROOT = Path(__file__).resolve().parents[1]
RANKS = 8
SCHEDULES = ("static", "nested")
WARM_UP_STEPS = 1
LOSS_TOLERANCE = 1e-4
"""Relative; both runs start from the same weights and drift apart by rounding alone."""
START_SECONDS, STEP_SECONDS = 300, 600
"""The longest that the quickstart waits for a job to start, and for a step."""

MODEL = """
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 344 --num-attention-heads 8
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --attention-dropout 0 --hidden-dropout 0 --make-vocab-size-divisible-by 8
"""
TRAINING = """
    --micro-batch-size 1 --lr 1e-3 --lr-decay-style constant --calculate-per-token-loss
    --split 100,0,0 --eval-iters 0 --eval-interval 1000 --log-interval 1
"""

console = Console()


class Job:
    """One torchrun of Megatron, and what its steps reported."""

    def __init__(self, schedule: str, options: argparse.Namespace, data: list[str], store: torch.distributed.TCPStore):
        self.schedule = schedule
        self.steps: list[dict[str, Any]] = []
        self.log = options.output / f"{schedule}.log"
        self._store = store
        arguments = [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"),
            *("-m", "megatron_flexsp.run", "--cpu", str(ROOT / "scripts" / "quickstart_train.py")),
            *(*MODEL.split(), *TRAINING.split(), *data),
            *("--seq-length", str(options.context), "--max-position-embeddings", str(options.context)),
            *("--global-batch-size", str(options.documents), "--train-iters", str(options.steps)),
            *("--flexsp", "--flexsp-schedule", schedule, "--flexsp-overlong", "drop"),
            *("--flexsp-max-tokens-per-rank", str(options.tokens_per_rank)),
        ]
        environment = {
            **os.environ,
            "FLEXSP_QUICKSTART_JOB": schedule,
            "FLEXSP_QUICKSTART_PORT": str(store.port),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "ignore",
        }
        with self.log.open("w") as stream:
            stream.write(" ".join(arguments) + "\n\n")
            stream.flush()
            self._process = subprocess.Popen(
                arguments, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
            )

    def wait_for(self, what: str, limit_seconds: float) -> str:
        """Wait until the job has set a key; say what its log says if it ends instead."""
        key, deadline = f"{self.schedule}/{what}", time.monotonic() + limit_seconds
        while not self._store.check([key]):
            ended = self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                last_lines = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
                reason = "ended early" if ended else f"took longer than {limit_seconds:.0f} s"
                raise FlexSPError(f"the {self.schedule} run {reason}; the end of {self.log}:\n{last_lines}")
            time.sleep(0.02)
        return self._store.get(key).decode()

    def run_step(self, number: int) -> dict[str, Any]:
        """Give the job its turn and wait until it is done."""
        self.wait_for(f"ready/{number}", START_SECONDS)
        self._store.set(f"{self.schedule}/turn/{number}", "")
        self.steps.append(json.loads(self.wait_for(f"done/{number}", STEP_SECONDS)))
        return self.steps[-1]

    def finish(self) -> None:
        """Let the job end by itself; end it if it doesn't."""
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.stop()

    def stop(self) -> None:
        """End the job and its ranks: torchrun passes the signal on."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._process.kill()


@dataclass
class Summary:
    """One job's figures over its steps after the warm-up."""

    job: Job
    tokens_per_second: float = field(init=False)
    padding_share: float = field(init=False)
    micro_batches: float = field(init=False)
    degrees: Counter[int] = field(init=False)

    def __post_init__(self) -> None:
        steps = self.job.steps[WARM_UP_STEPS:]
        self.tokens_per_second = sum(s["tokens"] for s in steps) / sum(s["seconds"] for s in steps)
        self.padding_share = statistics.mean(s["padding_share"] for s in steps)
        self.micro_batches = statistics.mean(len(s["plan"]["micro_batches"]) for s in steps)
        self.degrees = Counter()
        for step in steps:
            for item in step["plan"]["micro_batches"]:
                self.degrees[item["degree"]] += sum(step["lengths"][k] for k in item["sequences"])


def main() -> int:
    options = parse_options()
    options.output.mkdir(parents=True, exist_ok=True)
    data = prepare_data(options)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    jobs: list[Job] = []
    try:
        for schedule in SCHEDULES:
            jobs.append(Job(schedule, options, data, store))
        train(jobs, options.steps)
        for job in jobs:
            job.finish()
    finally:
        for job in jobs:
            job.stop()
    return report(jobs, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="training steps of each run (default: %(default)s)")
    parser.add_argument("--documents", type=int, default=32, help="documents in a step (default: %(default)s)")
    parser.add_argument("--context", type=int, default=4096, help="longest document in tokens (default: %(default)s)")
    parser.add_argument(
        "--tokens-per-rank", type=int, default=512, help="what a rank holds in a micro-batch (default: %(default)s)"
    )
    parser.add_argument(
        "--lengths",
        metavar="SPEC",
        help="train on made-up documents of these lengths instead: see --flexsp-mock-lengths",
    )
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "quickstart", help="where logs and results go")
    options = parser.parse_args()
    if options.steps <= WARM_UP_STEPS:
        parser.error(f"--steps must be more than {WARM_UP_STEPS}, which is not counted")
    if options.documents < 1 or options.documents % RANKS:
        parser.error(f"--documents must be a multiple of {RANKS}")
    return options


def prepare_data(options: argparse.Namespace) -> list[str]:
    """Megatron's data arguments; the corpus is made the first time."""
    if options.lengths is not None:
        return ["--mock-data", "--flexsp-mock-lengths", options.lengths, *MEGATRON_TOKENIZER_ARGUMENTS]
    prefix = options.output / "standard_library"
    if not prefix.with_suffix(".idx").exists():
        console.print("preparing the corpus: the source files of Python's standard library, as bytes ...")
        # The index is written last: without it, what is there is the rest of an interrupted run.
        prefix.with_suffix(".bin").unlink(missing_ok=True)
        summary = write_dataset(StandardLibrary(), prefix)
        console.print(f"  {summary.documents:,} documents, {summary.tokens:,} tokens")
    return ["--data-path", str(prefix), *MEGATRON_TOKENIZER_ARGUMENTS]


def train(jobs: list[Job], steps: int) -> None:
    """Step by step, each job in turn, first one first and then the other."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"starting two Megatron jobs of {RANKS} ranks", total=steps)
        for job in jobs:
            job.wait_for("ready/0", START_SECONDS)
        progress.update(task, description="training")
        for number in range(steps):
            for job in jobs if number % 2 == 0 else reversed(jobs):
                job.run_step(number)
            times = " | ".join(f"{job.schedule} {job.steps[-1]['seconds']:5.2f} s" for job in jobs)
            progress.console.print(
                f"step {number + 1:2d} | loss {jobs[-1].steps[-1]['loss']:.4f} | {times}", highlight=False
            )
            progress.advance(task)


def report(jobs: list[Job], options: argparse.Namespace) -> int:
    static, nested = (Summary(job) for job in jobs)
    speedup = nested.tokens_per_second / static.tokens_per_second
    losses = Table("step", *(f"loss, {job.schedule}" for job in jobs), "relative difference", title="Loss curves")
    differences = []
    for number, pair in enumerate(zip(*(job.steps for job in jobs), strict=True), start=1):
        first, second = (step["loss"] for step in pair)
        differences.append(abs(first - second) / abs(first))
        losses.add_row(str(number), f"{first:.6f}", f"{second:.6f}", f"{differences[-1]:.1e}")
    console.print(losses)

    speeds = Table(
        "", "static group", "FlexSP nested", title=f"{RANKS} ranks, steps {WARM_UP_STEPS + 1} to {options.steps}"
    )
    both = (static, nested)
    speeds.add_row("tokens per second", *(f"{s.tokens_per_second:,.0f}" for s in both))
    speeds.add_row("relative speed", "1.00", f"{speedup:.2f}")
    speeds.add_row("padding share", *(f"{s.padding_share:.2%}" for s in both))
    speeds.add_row("micro-batches a step", *(f"{s.micro_batches:.1f}" for s in both))
    speeds.add_row("tokens by group size", *(_shares(s.degrees) for s in both))
    console.print(speeds)
    console.print(draw(nested.job.steps[-1]), highlight=False, markup=False)

    result = options.output / "result.json"
    steps = {job.schedule: job.steps for job in jobs}
    result.write_text(json.dumps({"speedup": speedup, "largest_loss_difference": max(differences), "steps": steps}))
    console.print(f"logs and figures: {options.output}")
    if max(differences) > LOSS_TOLERANCE:
        console.print(
            f"[red]the loss curves differ by up to {max(differences):.1e}; expected at most {LOSS_TOLERANCE:.0e}"
        )
        return 1
    console.print(f"The loss curves agree to {max(differences):.1e}. FlexSP ran at {speedup:.2f} times the speed.")
    return 0


def _shares(tokens_by_degree: Counter[int]) -> str:
    total = sum(tokens_by_degree.values())
    return ", ".join(f"{degree}: {tokens / total:.0%}" for degree, tokens in sorted(tokens_by_degree.items()) if tokens)


def draw(step: dict[str, Any]) -> str:
    """The last step's plan: a line for each rank, a cell for each micro-batch with its group and documents."""
    plan = Plan.from_json(json.dumps(step["plan"]))
    width = 12
    lines = [f"The plan of step {len(step)}: each rank's micro-batches, as group size x documents (tokens)"]
    for rank in range(plan.domain_size):
        cells = []
        for item in plan.micro_batches_of_rank(rank):
            tokens = sum(step["lengths"][k] for k in item.sequences)
            cells.append(f"{item.degree}x{len(item.sequences)} ({tokens})".ljust(width))
        lines.append(f"rank {rank} | " + "| ".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FlexSPError as error:
        console.print(f"[red]quickstart: {error}", markup=True, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
